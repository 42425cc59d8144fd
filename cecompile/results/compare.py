"""Compares two results of the same questions and the same model, question by question."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cecompile.errors import CheckError, UserError, printable
from cecompile.results.check import problems_of
from cecompile.results.clock import CLOCKS
from cecompile.results.read import StoredResult, read_result, value_at
from cecompile.tasks import chat, judge
from cecompile.tasks.chat import AnswerSample
from cecompile.tasks.judge import MAX_DROP, Sample

NORMAL_95 = 1.959964  # two-sided, of the standard normal distribution
_SLACK = 1e-9  # points: 0.1 + 0.2 is not 0.3

# The fields that two results must share, in the words of the message. A fingerprint is the checkpoint's, so that
# precisions may differ.
_SAME = {
    "task": "task", "questions": "number of questions", "data.digest": "data", "model.tokenizer_digest": "tokenizer",
    "model.architecture": "model", "model.parameters": "model", "model.fingerprint": "model",
    "answers.max_new_tokens": "longest answer",
}  # fmt: skip

Samples = Sequence[Sample | AnswerSample]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The `comparison` of results.json.

    Attributes:
        baseline: the reference's name.
        max_drop: the most points that a metric may drop.
        drop_points: per accuracy, the reference's minus the candidate's, in points of 100; None without labels.
        interval_points: per accuracy, the drop's 95 % confidence interval, see `paired_drop`; None where there is none.
        agreement: fraction of the questions on which the answers are the same.
        largest_difference: the largest difference of a loglikelihood; None for texts.
        differing: the number of questions on which the answers differ.
        speed_ratio: the reference's seconds over the candidate's, on the candidate's headline clock; None where a run
            was resumed.
        inference_speed_ratio: the same ratio of inference alone.
        verdict: "within" or "past" `max_drop`. Without labels, every question that differs counts as a drop of
            accuracy.
    """

    baseline: str
    max_drop: float
    drop_points: dict[str, float | None]
    interval_points: dict[str, list[float] | None]
    agreement: float
    largest_difference: float | None
    differing: int
    speed_ratio: float | None
    inference_speed_ratio: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """A result to compare a finished run with, and the most points that a metric may drop."""

    stored: StoredResult
    max_drop: float = MAX_DROP


def read_baseline(directory: Path, max_drop: float = MAX_DROP) -> Baseline:
    """Reads a baseline.

    Raises:
        UserError: `directory` is not a result directory.
        CheckError: the result contradicts itself.
    """
    stored = read_result(directory)
    wrong = problems_of(stored)
    if wrong:
        raise CheckError(f"baseline {directory}: {wrong[0]}")
    return Baseline(stored, max_drop)


def refuse_other(reference: StoredResult, name: str, results: Mapping[str, Any], whole: bool = True) -> None:
    """Refuses to compare results of different questions, models or tokenizers.

    Args:
        reference: the result to compare with.
        name: of the other result.
        results: results.json of the other result, or the fields known so far.
        whole: whether `results` is complete; otherwise missing fields are passed over.

    Raises:
        UserError: the results cannot be compared.
    """
    for path, what in _SAME.items():
        ours, theirs = _identity(reference.results, path), _identity(results, path)
        if ours == theirs and (ours is not None or path.startswith("answers.")):
            continue
        if theirs is None and not whole:
            continue
        if ours is None or theirs is None:
            lacking = reference.name if ours is None else name
            raise UserError(f"{lacking}: results.json: field '{path}': missing; it cannot be compared")
        raise UserError(f"{name}: another {what} than in {reference.name}: {path} {_brief(theirs)} and {_brief(ours)}")


def _identity(results: Mapping[str, Any], path: str) -> Any:
    """The value at `path`; the fingerprint of a model without files is that of its tensors on the device."""
    value = value_at(results, path)
    return value_at(results, "model.device_fingerprint") if value is None and path == "model.fingerprint" else value


def _brief(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)


def compare(
    reference: StoredResult, name: str, results: Mapping[str, Any], samples: Samples, max_drop: float = MAX_DROP
) -> tuple[Comparison, list[dict[str, Any]]]:
    """Compares a result with a reference.

    Args:
        reference: the result to compare with.
        name, results, samples: the candidate's.
        max_drop: in points.

    Returns:
        The comparison, and every question that the two answer differently: its `id` and `label`, both answers
        (`reference` and `candidate`: predictions by metric, or the text), and the `largest_difference` of its
        loglikelihoods, None for texts.

    Raises:
        UserError: the results cannot be compared: see `refuse_other`, or their samples are of other questions.
    """
    refuse_other(reference, name, results)
    before: Samples = reference.samples
    if list(map(_asked, before)) != list(map(_asked, samples)):
        raise UserError(f"{name}: samples.jsonl: other questions or labels than in {reference.name}")
    differences = [d for a, b in zip(before, samples, strict=True) if (d := _difference(a, b, name)) is not None]
    now = _accuracies(samples)
    drops = {metric: paired_drop(values, now[metric]) for metric, values in _accuracies(before).items()}
    known = [drop for drop, _ in drops.values() if drop is not None]
    worst = max(known or [100 * len(differences) / len(samples)])
    comparison = Comparison(
        baseline=reference.name,
        max_drop=max_drop,
        drop_points={metric: drop for metric, (drop, _) in drops.items()},
        interval_points={metric: interval for metric, (_, interval) in drops.items()},
        agreement=1 - len(differences) / len(samples),
        largest_difference=_largest(before, samples),
        differing=len(differences),
        speed_ratio=_ratio(reference, name, results, value_at(results, "headline.clock")),
        inference_speed_ratio=_ratio(reference, name, results, "inference"),
        verdict="past" if worst > max_drop + _SLACK else "within",
    )
    return comparison, differences


def paired_drop(
    reference: Sequence[float | None], candidate: Sequence[float | None]
) -> tuple[float | None, list[float] | None]:
    """The drop of an accuracy, in points, and its 95 % confidence interval.

    The questions are the same, so the samples are d = right before - right now for each question: -1, 0 or 1, or a
    difference of probabilities. The drop is the mean of d. The interval is mean ± 1.96 s / sqrt(n) with d's sample
    standard deviation s (n - 1): the normal approximation of a paired difference.

    Args:
        reference, candidate: per question, whether the answer is right, or the probability of the right answers; None
            where the right answer is not known.

    Returns:
        None for both where a right answer is not known; None for the interval of fewer than two questions.
    """
    if any(value is None for value in (*reference, *candidate)):
        return None, None
    d = np.asarray(reference, dtype=np.float64) - np.asarray(candidate, dtype=np.float64)
    drop = float(d.mean())
    if len(d) < 2:
        return 100 * drop, None
    half = NORMAL_95 * float(d.std(ddof=1)) / math.sqrt(len(d))
    return 100 * drop, [100 * (drop - half), 100 * (drop + half)]


def values_by_metric(samples: Samples) -> dict[str, list[Any]]:
    """By metric, what each sample adds; see `judge.values_by_metric`."""
    answers = [one for one in samples if isinstance(one, AnswerSample)]
    if answers:
        return {**chat.values_by_metric(answers)}
    return judge.values_by_metric([one for one in samples if isinstance(one, Sample)])


def _accuracies(samples: Samples) -> dict[str, list[float | None]]:
    return {metric: values for metric, values in values_by_metric(samples).items() if metric != "perplexity"}


def _answer(sample: Sample | AnswerSample) -> dict[str, int] | str:
    if isinstance(sample, AnswerSample):
        return sample.text
    if len(sample.loglikelihoods) == 1:
        return {"acc": int(sample.greedy[0])}
    return {"acc": sample.prediction, "acc_norm": sample.prediction_norm}


def _asked(sample: Sample | AnswerSample) -> tuple[Any, ...]:
    return sample.id, sample.label, sample.true if isinstance(sample, Sample) else ()


def _difference(a: Sample | AnswerSample, b: Sample | AnswerSample, name: str) -> dict[str, Any] | None:
    if isinstance(a, Sample) and isinstance(b, Sample) and len(a.loglikelihoods) != len(b.loglikelihoods):
        raise UserError(f"{name}: samples.jsonl: question '{a.id}' has another number of choices")
    answers = {"reference": _answer(a), "candidate": _answer(b)}
    if answers["reference"] == answers["candidate"]:
        return None
    return {"id": a.id, "label": a.label, **answers, "largest_difference": _largest([a], [b])}


def _largest(a: Samples, b: Samples) -> float | None:
    """The largest difference of a loglikelihood; None for texts."""
    apart = [
        0.0 if x == y else abs(x - y)  # also where both are minus infinity
        for one, other in zip(a, b, strict=True)
        if isinstance(one, Sample) and isinstance(other, Sample)
        for x, y in zip(one.loglikelihoods, other.loglikelihoods, strict=True)
    ]
    return max(apart, default=None)


def _ratio(reference: StoredResult, name: str, results: Mapping[str, Any], clock: Any) -> float | None:
    """The reference's seconds over the candidate's; None where one was resumed: its latencies are of a part."""
    if reference.results.get("resumed") or results.get("resumed"):
        return None
    seconds = []
    for who, held in ((reference.name, reference.results), (name, results)):
        latency = value_at(held, "latency_s") or {}
        value = latency.get(clock) if clock in CLOCKS else None
        if not isinstance(value, (int, float)) or value <= 0:
            raise UserError(f"{who}: results.json: field 'latency_s.{printable(str(clock), 40)}': not a time")
        seconds.append(float(value))
    return seconds[0] / seconds[1]


def compare_directories(reference: Path, candidate: Path, max_drop: float = MAX_DROP) -> dict[str, Any]:
    """The comparison of two result directories, as plain JSON values.

    Returns:
        The fields of `Comparison`, `reference` and `candidate` (names), `metrics` of both, `clock` (of the candidate's
        headline), `differences` (see `compare`), `problems` of both, and `failed`: the reasons for exit status 1.

    Raises:
        UserError: one is not a result directory, or the results cannot be compared.
    """
    stored = {"reference": read_result(reference), "candidate": read_result(candidate)}
    other = stored["candidate"]
    comparison, differences = compare(stored["reference"], other.name, other.results, other.samples, max_drop)
    found = {who: problems_of(one) for who, one in stored.items()}
    failed = [f"{stored[who].name}: {problem}" for who, some in found.items() for problem in some]
    if comparison.verdict == "past":
        failed.append(past(comparison))
    return {
        "reference": stored["reference"].name,
        "candidate": other.name,
        "metrics": {who: one.results["metrics"] for who, one in stored.items()},
        "clock": value_at(other.results, "headline.clock"),
        **asdict(comparison),
        "differences": differences,
        "problems": found,
        "failed": failed,
    }


def past(comparison: Comparison) -> str:
    """The reason why a comparison fails, in one line."""
    drops = {metric: drop for metric, drop in comparison.drop_points.items() if drop is not None}
    if not drops:
        return f"{comparison.differing} answers differ, which may be a drop of more than {comparison.max_drop} points"
    metric = max(drops, key=lambda name: drops[name])
    allowed = f"at most {comparison.max_drop} are allowed"
    return f"{metric} dropped by {drops[metric]:.2f} points against {comparison.baseline}, {allowed}"
