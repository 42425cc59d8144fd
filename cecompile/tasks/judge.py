"""Judging: from loglikelihoods to predictions and metrics, as in lm-evaluation-harness."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cecompile.tasks.question import Question

METRICS = ("exact_match", "acc_norm", "acc")  # a result is known by the first that it has
MAX_DROP = 0.5  # points of accuracy that a faster run may lose, as the 2024 contest allowed


@dataclass(frozen=True, slots=True)
class Sample:
    """A judged question."""

    id: str
    label: int | None
    prediction: int  # the choice of the highest loglikelihood, the first of equals
    prediction_norm: int  # the choice of the highest loglikelihood per character of the choice
    loglikelihoods: tuple[float, ...]  # per choice, the sum of its tokens' log-probabilities (natural logarithm)
    greedy: tuple[bool, ...]  # per choice, whether greedy decoding from the context produces the choice


def judge(question: Question, loglikelihoods: Sequence[float], greedy: Sequence[bool]) -> Sample:
    """Picks a choice; `loglikelihoods` and `greedy` are in the order of the choices."""
    values = np.asarray(loglikelihoods, dtype=np.float64)
    lengths = np.array([len(choice) for choice in question.choices], dtype=np.float64)
    best, best_norm = int(values.argmax()), int((values / lengths).argmax())
    return Sample(question.id, question.label, best, best_norm, tuple(values.tolist()), tuple(map(bool, greedy)))


def metrics(samples: Sequence[Sample]) -> dict[str, float | None]:
    """`acc`, `acc_norm` (fractions of 1) and their standard errors; None where there are no labels."""
    return metrics_of(right_choices(samples))


def right_choices(samples: Sequence[Sample]) -> dict[str, list[bool | None]]:
    """By metric, which samples are right; None where not all have labels."""
    labelled = all(s.label is not None for s in samples)
    return {
        "acc": [s.prediction == s.label if labelled else None for s in samples],
        "acc_norm": [s.prediction_norm == s.label if labelled else None for s in samples],
    }


def metrics_of(right: Mapping[str, Sequence[int | None]]) -> dict[str, float | None]:
    """Per metric, the fraction of samples that are right, and its standard error as `NAME_stderr`.

    Both are None where not all samples are known. The standard error is the sample standard deviation (n - 1) over the
    square root of n.
    """
    out: dict[str, float | None] = {}
    for name, known in right.items():
        if any(r is None for r in known):
            out |= {name: None, f"{name}_stderr": None}
            continue
        values = np.fromiter(known, np.float64, len(known))
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        out |= {name: float(np.mean(values)), f"{name}_stderr": error}
    return out
