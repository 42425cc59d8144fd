"""An evaluation: scores or answers, judged, with everything that results.json says about the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cecompile.answerer import Answerer
from cecompile.engine import memory
from cecompile.packed import Workload
from cecompile.report.clock import Clock, latencies, spread
from cecompile.report.journal import Journal
from cecompile.report.results import (
    SCHEMA,
    environment,
    plan_summary,
    write_predictions,
    write_results,
    write_samples,
)
from cecompile.runtime import Progress, Runtime
from cecompile.scorer import Scorer
from cecompile.system import cpu_model
from cecompile.tasks.chat import AnswerSample, ChatQuestion, answer_metrics, judge_answer
from cecompile.tasks.judge import Sample, judge, metrics
from cecompile.tasks.question import Question, digest


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What results.json and samples.jsonl hold."""

    results: dict[str, Any]
    samples: list[Sample] | list[AnswerSample]


@dataclass(frozen=True, slots=True)
class _Judged:
    """A run's outcome: samples, what results.json says of them, and how they came about."""

    samples: list[Any]
    facts: dict[str, Any]
    workload: Workload
    inference_s: list[float]


def evaluate(
    model: Scorer | Answerer,
    questions: Sequence[Question] | Sequence[ChatQuestion],
    *,
    task: str = "choices",
    data: str = "questions",
    headline: str = "strict",
    clock: Clock | None = None,
    progress: Progress = lambda *_: None,
    repeat: int = 1,
    output: Path | None = None,
    journal: Journal | None = None,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Evaluation:
    """Scores or answers, and judges.

    Args:
        model: a scorer, or an answerer for chat questions.
        questions: at least one.
        task, data: names for the result.
        headline: which latency the run is known by: "strict", "section3" or "inference".
        clock: already running where reading is to be counted; left in the phase `score`.
        progress: see `Scorer.score`.
        repeat: times the inference phase runs; the latencies then count its median.
        output: directory for results.json and samples.jsonl, and answers' predictions.jsonl; None writes nothing.
        journal: of `output`, open; takes what is finished as it is, and is removed when all is written.
        report: called with the results before they are written, as the last thing that the clock sees.

    Raises:
        UserError, CheckError: see `Scorer.score`; UserError too where the file system refuses. The journal then keeps
            what is finished.
    """
    clock = clock or Clock()
    if journal is not None:
        journal.expect({"task": task, "data digest": digest(questions), **_version_facts(model.runtime)})
    run = _answered if isinstance(model, Answerer) else _scored
    judged = run(model, questions, clock, progress, repeat, journal)  # type: ignore[arg-type]
    resumed = None if journal is None else journal.resumed
    runtime, plan = model.runtime, judged.workload.plan
    if output is not None:
        write_samples(output, judged.samples)
        if isinstance(model, Answerer):
            write_predictions(output, [sample.text for sample in judged.samples])
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "task": task,
        "questions": len(questions),
        **judged.facts,
        **_times(clock, judged.inference_s, headline, resumed),
        "resumed": resumed,
        "inference_s": spread(judged.inference_s),
        "engine": {
            "name": runtime.engine,
            "attention": None if runtime.engine == "reference" else runtime.attention,
            "note": runtime.note,
        },
        "plan": None if plan is None else plan_summary(plan),
        "model": _model(runtime),
        "cache": None
        if runtime.cache_state is None
        else {"state": runtime.cache_state[0], "reason": runtime.cache_state[1]},
        "memory": {
            "limit_bytes": runtime.sizing.limit,
            "predicted_bytes": runtime.predicted_bytes,
            "peak_bytes": memory.peak(runtime.device),
        },
        "data": {"name": data, "digest": digest(questions)},
        "environment": environment(_device_name(runtime.device)),
    }
    report(results)
    results.update(_times(clock, judged.inference_s, headline, resumed))
    if output is not None:
        write_results(output, results)
    if journal is not None:
        journal.remove()
    return Evaluation(results, judged.samples)


def _scored(
    scorer: Scorer, questions: Sequence[Question], clock: Clock, progress: Progress, repeat: int,
    journal: Journal | None,
) -> _Judged:  # fmt: skip
    scores = scorer.score(questions, clock=clock, progress=progress, repeat=repeat, journal=journal)
    clock.enter("score")
    samples = [
        judge(question, values, greedy)
        for question, values, greedy in zip(questions, scores.loglikelihoods, scores.greedy, strict=True)
    ]
    facts = {
        "choices": sum(len(q.choices) for q in questions),
        "truncated_questions": scores.workload.truncated_questions,
        "metrics": metrics(samples),
    }
    return _Judged(samples, facts, scores.workload, scores.inference_s)


def _answered(
    answerer: Answerer, questions: Sequence[ChatQuestion], clock: Clock, progress: Progress, repeat: int,
    journal: Journal | None,
) -> _Judged:  # fmt: skip
    answers = answerer.answer(questions, clock=clock, progress=progress, repeat=repeat, journal=journal)
    clock.enter("score")
    samples = [
        judge_answer(question, one.text, one.tokens, one.decoded_tokens)
        for question, one in zip(questions, answers.answers, strict=True)
    ]
    known = [s for s in samples if s.tokens is not None]
    facts = {
        "choices": sum(len(q.choices) for q in questions),
        "metrics": answer_metrics(samples),
        "answers": {
            "in_tree": sum(bool(s.in_tree) for s in known) if known else None,
            "tokens": sum(s.tokens or 0 for s in known) if known else None,
            "decoded_tokens": sum(s.decoded_tokens or 0 for s in known) if known else None,
            "max_new_tokens": answerer.new_tokens,
        },
    }
    return _Judged(samples, facts, answers.workload, answers.inference_s)


def _times(clock: Clock, inference: Sequence[float], headline: str, resumed: dict[str, Any] | None) -> dict[str, Any]:
    """What the results say of the clock, up to now. A run of which a part was done before has no headline."""
    phases = clock.phases()
    seconds = latencies(phases, inference)
    known_by = {"clock": headline, "seconds": None if resumed else seconds[headline]}
    return {"latency_s": seconds, "headline": known_by, "phases_s": phases}


def _version_facts(runtime: Runtime) -> dict[str, Any]:
    """The versions that a result depends on, by name."""
    about = environment(_device_name(runtime.device))
    return {"python": about["python"], "system": about["system"], **about["versions"]}


def _model(runtime: Runtime) -> dict[str, Any]:
    model = runtime.model
    assert model is not None  # it has just scored
    return {
        "name": runtime.name,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": runtime.fingerprint,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = cpu_model()
    return f"CPU ({name})" if name else "CPU"
