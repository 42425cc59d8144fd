"""Judging: from loglikelihoods to predictions and metrics, as in lm-evaluation-harness."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    true: tuple[int, ...] = ()  # see `Question`


def judge(question: Question, loglikelihoods: Sequence[float], greedy: Sequence[bool]) -> Sample:
    """Picks a choice; `loglikelihoods` and `greedy` are in the order of the choices."""
    values = np.asarray(loglikelihoods, dtype=np.float64)
    lengths = np.array([len(choice) for choice in question.choices], dtype=np.float64)
    best, best_norm = int(values.argmax()), int((values / lengths).argmax())
    loglikelihoods = tuple(values.tolist())
    return Sample(question.id, question.label, best, best_norm, loglikelihoods, tuple(map(bool, greedy)), question.true)


def metrics(samples: Sequence[Sample]) -> dict[str, float | None]:
    """The metrics of `values_by_metric`, as fractions of 1 but for `perplexity`, and their standard errors."""
    return metrics_of(values_by_metric(samples))


def values_by_metric(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """By metric, what each sample adds; None where not all samples have labels. All samples are of one format.

    One choice is right: `acc` and `acc_norm`, whether the sample is right. Several are: `acc`, the probability of the
    right ones, of all choices'. There is one choice alone: `acc`, whether greedy decoding gives the choice, and
    `perplexity`, its loglikelihood.
    """
    if samples and len(samples[0].loglikelihoods) == 1:
        return {"perplexity": [s.loglikelihoods[0] for s in samples], "acc": [s.greedy[0] for s in samples]}
    if samples and samples[0].true:
        return {"acc": [_true_mass(s) for s in samples]}
    labelled = all(s.label is not None for s in samples)
    return {
        "acc": [s.prediction == s.label if labelled else None for s in samples],
        "acc_norm": [s.prediction_norm == s.label if labelled else None for s in samples],
    }


def _true_mass(sample: Sample) -> float:
    """The probability of the right choices, where one of the choices is given."""
    values = np.asarray(sample.loglikelihoods, dtype=np.float64)
    if np.isneginf(values).all():
        return 0.0
    probabilities = np.exp(values - values.max())
    return float(probabilities[list(sample.true)].sum() / probabilities.sum())


def metrics_of(values_by_name: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Per metric, the mean of what the samples add, and its standard error as `NAME_stderr`.

    The standard error is the sample standard deviation (n - 1) over the square root of n. `perplexity` is the
    exponential of minus the mean; its standard error is the mean's times the perplexity (the delta method). Both are
    None where not all samples are known, or the perplexity is infinite.
    """
    out: dict[str, float | None] = {}
    for name, known in values_by_name.items():
        if any(value is None for value in known):
            out |= {name: None, f"{name}_stderr": None}
            continue
        values = np.fromiter(known, np.float64, len(known))
        mean: float | None = float(np.mean(values))
        with np.errstate(invalid="ignore"):  # minus infinity among the loglikelihoods
            error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        if name == "perplexity" and mean is not None:
            mean, error = _exponential(mean, error)
        out |= {name: mean, f"{name}_stderr": error}
    return out


def _exponential(mean: float, error: float | None) -> tuple[float | None, float | None]:
    """The exponential of minus the mean, and its standard error; None where they are beyond numbers."""
    try:
        value = math.exp(-mean)
    except OverflowError:
        return None, None
    if math.isinf(value):
        return None, None
    return value, None if error is None else error * value
