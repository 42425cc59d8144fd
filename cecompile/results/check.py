"""Checks that a result is consistent: computes again every field that follows from other fields."""

import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from cecompile.results.clock import PHASES, latencies
from cecompile.results.read import StoredResult, read_result, value_at
from cecompile.results.write import digest_of_results, file_digests
from cecompile.tasks.chat import AnswerSample, answer_metrics
from cecompile.tasks.judge import Sample, metrics

CLOSE = 1e-6  # seconds, or a fraction of one: the difference that another order of summation may make

# Bits of exponent and of mantissa. A dtype with at least as many bits of both holds every value of the other dtype.
_BITS = {
    "float64": (11, 52), "float32": (8, 23), "bfloat16": (8, 7), "float16": (5, 10),
    "float8_e5m2": (5, 2), "float8_e5m2fnuz": (5, 2), "float8_e4m3fn": (4, 3), "float8_e4m3fnuz": (4, 3),
}  # fmt: skip
Problems = Iterator[str]


def problems(directory: Path) -> list[str]:
    """The contradictions in a result directory, one line each; none if the result is consistent.

    Raises:
        UserError: `directory` is not a result directory; see `read_result`.
    """
    return problems_of(read_result(directory))


def problems_of(stored: StoredResult) -> list[str]:
    """The contradictions in a result that has been read; see `problems`."""
    found = list(_digests(stored))
    for check in (
        _samples, _metrics, _clock, _timeline, _warmup, _weights, _precision, _plan, _ranks, _memory, _comparison,
    ):  # fmt: skip
        try:
            for problem in check(stored):  # one by one, so that the problems before an error stay
                found.append(problem)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            name = check.__name__.removeprefix("_")
            found.append(f"results.json: {name} cannot be checked: {type(error).__name__}: {error}")
    return found


def _digests(stored: StoredResult) -> Problems:
    results = stored.results
    if results.get("digest") is None:
        yield "results.json: field 'digest': missing"
    elif results["digest"] != digest_of_results(results):
        yield "results.json: was edited: its digest is another"
    written = results.get("samples_digest")
    if not isinstance(written, dict):
        yield "results.json: field 'samples_digest': missing"
        return
    for name, digest in file_digests(Path(stored.name)).items():
        if written.get(name) != digest:
            yield f"{name}: was edited: its digest is not the one in results.json"


def _samples(stored: StoredResult) -> Problems:
    results, samples = stored.results, stored.samples
    if len(samples) != results["questions"]:
        yield f"samples.jsonl: {len(samples)} samples of {results['questions']} questions"
    scored = [one for one in samples if isinstance(one, Sample)]
    for number, one in enumerate(scored, 1):
        where, values = f"samples.jsonl: line {number}", one.loglikelihoods
        if one.prediction != values.index(max(values)):
            yield f"{where}: the prediction is not the choice of the highest loglikelihood"
        elif len(one.greedy) != len(values):
            yield f"{where}: {len(values)} loglikelihoods, {len(one.greedy)} greedy"
        elif not 0 <= one.prediction_norm < len(values):
            yield f"{where}: prediction_norm is none of the choices"
    choices = sum(len(one.loglikelihoods) for one in scored)
    if scored and choices != results["choices"]:
        yield f"samples.jsonl: {choices} loglikelihoods of {results['choices']} choices"
    texts = [one.text for one in samples if isinstance(one, AnswerSample)]
    if stored.predictions is not None and stored.predictions != texts:
        yield "predictions.jsonl: other texts than in samples.jsonl"


def _metrics(stored: StoredResult) -> Problems:
    answers = [one for one in stored.samples if isinstance(one, AnswerSample)]
    for number, one in enumerate(answers, 1):
        right = None if one.label is None else one.text.lstrip().replace("\n", "") == one.label
        if one.correct is not right:
            yield f"samples.jsonl: line {number}: correct is {one.correct}, the text and the label say {right}"
    chat = stored.results["task"] == "chat"
    again = answer_metrics(answers) if chat else metrics([one for one in stored.samples if isinstance(one, Sample)])
    for name, value in again.items():
        yield from _equal(f"metrics.{name}", stored.results["metrics"][name], value, "samples.jsonl gives")


def _equal(field: str, said: float | None, value: float | None, source: str) -> Problems:
    if not _close(said, value):
        yield f"results.json: {field} is {said}, {source} {value}"


def _clock(stored: StoredResult) -> Problems:
    results = stored.results
    phases, runs = results["phases_s"], results["inference_s"]
    if set(phases) != set(PHASES):
        yield f"results.json: phases_s has {', '.join(phases)}"
        return
    for name, value in latencies(phases, [runs["median"]] * runs["runs"]).items():
        yield from _equal(f"latency_s.{name}", results["latency_s"][name], value, "the phases give")
    if not runs["min"] <= runs["median"] <= runs["max"]:
        yield "results.json: inference_s: the median is not between the least and the most"
    if (runs["runs"] - 1) * runs["min"] + runs["max"] > phases["inference"] + CLOSE:
        yield "results.json: inference_s: its runs take longer than the phase"
    headline = results["headline"]
    known_by = None if results["resumed"] else results["latency_s"][headline["clock"]]
    if not _close(headline["seconds"], known_by):
        yield f"results.json: headline: {headline['seconds']} s is not the latency '{headline['clock']}'"


def _timeline(stored: StoredResult) -> Problems:
    timeline, sums, last = stored.results["timeline"], dict.fromkeys(PHASES, 0.0), 0.0
    for phase, begin, end in timeline:
        sums[phase] += end - begin
        if not _close(begin, last) or end < begin:
            yield f"results.json: timeline: {phase} begins at {begin}, what came before ends at {last}"
        last = end
    for phase, seconds in sums.items():
        yield from _equal(f"phases_s.{phase}", stored.results["phases_s"][phase], seconds, "the timeline gives")
    datetime.fromisoformat(stored.results["date"])


def _warmup(stored: StoredResult) -> Problems:
    results = stored.results
    for shape, moment in results["warmed"]:
        phases = [phase for phase, begin, end in results["timeline"] if begin - CLOSE <= moment <= end + CLOSE]
        if "warmup" not in phases:
            yield f"results.json: warmed: {shape}: at {moment:.3f} s, booked as {phases[0] if phases else 'nothing'}"
    if results["command"] is not None and results["plan"] is not None:
        warmed = {shape for shape, _ in results["warmed"]}
        for b in results["plan"]["buckets"]:
            shape = f"{b['rows']} x {b['length']} tokens, {b['readouts']} readouts"
            if shape not in warmed:
                yield f"results.json: warmed: the bucket {shape} was never warmed up"


def _weights(stored: StoredResult) -> Problems:
    model = stored.results["model"]
    if model["verified"] == "equal to the checkpoint" and model["device_fingerprint"] != model["fingerprint"]:
        yield "results.json: model.device_fingerprint is not the checkpoint's: other weights ran than were stored"
    if not model["device_fingerprint"]:
        yield "results.json: model.device_fingerprint: missing"
    replaced = model["changed"]["replaced_modules"]
    if replaced:
        yield f"results.json: model.changed: {len(replaced)} replaced modules, such as {replaced[0]}"


def _precision(stored: StoredResult) -> Problems:
    model = stored.results["model"]
    floats = {name: count for name, count in (model["stored_dtypes"] or {}).items() if name in _BITS}
    if floats:
        main = max(floats, key=lambda name: floats[name])
        if any(runs < held for runs, held in zip(_BITS[model["dtype"]], _BITS[main], strict=True)):
            yield f"results.json: model.dtype: {model['dtype']} is a lower precision than the checkpoint's {main}"


def _plan(stored: StoredResult) -> Problems:
    results = stored.results
    engine, plan, changed = results["engine"], results["plan"], results["model"]["changed"]
    if engine["name"] == "reference":
        if plan is not None or changed["attention"] or changed["compiled"]:
            yield "results.json: engine.name is reference, and the model was changed or has a plan"
        return
    if plan is None:
        yield f"results.json: plan: missing with the {engine['name']} engine"
        return
    if bool(changed["compiled"]) != (engine["name"] == "compiled"):
        yield f"results.json: model.changed.compiled: {changed['compiled']} with the {engine['name']} engine"
    slots = sum(b["rows"] * b["length"] * b["runs"] for b in plan["buckets"])
    if slots != plan["slots"]:
        yield f"results.json: plan.slots is {plan['slots']}, the buckets give {slots}"
    if not plan["prefix_tree_tokens"] <= plan["useful_tokens"] <= min(plan["unshared_tokens"], plan["slots"]):
        yield "results.json: plan: more useful tokens than sequences or slots, or fewer than the prefix tree"


def _ranks(stored: StoredResult) -> Problems:
    results = stored.results
    ranks, plan = results.get("ranks"), results["plan"]
    if ranks is None:
        return
    for name in ("passes", "tokens", "devices"):
        if len(ranks[name]) != ranks["size"]:
            yield f"results.json: ranks.{name} is of {len(ranks[name])} ranks, there were {ranks['size']}"
    if plan is not None:
        kept = (results["resumed"] or {"passes": 0})["passes"]
        planned = results["inference_s"]["runs"] * sum(b["runs"] for b in plan["buckets"]) - kept
        if sum(ranks["passes"]) != planned:
            yield f"results.json: ranks.passes: {sum(ranks['passes'])} in all, {planned} were to be run"


def _memory(stored: StoredResult) -> Problems:
    memory = stored.results["memory"]
    if memory["limit_bytes"] is not None and (memory["peak_bytes"] or 0) > memory["limit_bytes"]:
        yield f"results.json: memory.peak_bytes {memory['peak_bytes']} is above the limit {memory['limit_bytes']}"


def _comparison(stored: StoredResult) -> Problems:
    comparison: Any = value_at(stored.results, "comparison")
    if comparison is None:
        return
    drops = [drop for drop in comparison["drop_points"].values() if drop is not None]
    most = max(drops or [100 * (1 - comparison["agreement"])])
    if (most > comparison["max_drop"] + CLOSE) != (comparison["verdict"] == "past"):
        yield f"results.json: comparison.verdict is '{comparison['verdict']}' with a drop of {most} points"


def _close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE)
