"""An evaluation: scores, judged, with everything that results.json says about the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cecompile.engine import memory
from cecompile.report.clock import Clock, latencies, spread
from cecompile.report.results import SCHEMA, environment, plan_summary, write_results, write_samples
from cecompile.runtime import Progress, Runtime
from cecompile.scorer import Scorer
from cecompile.system import cpu_model
from cecompile.tasks.judge import Sample, judge, metrics
from cecompile.tasks.question import Question, digest


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What results.json and samples.jsonl hold."""

    results: dict[str, Any]
    samples: list[Sample]


def evaluate(
    scorer: Scorer,
    questions: Sequence[Question],
    *,
    task: str = "choices",
    data: str = "questions",
    headline: str = "strict",
    clock: Clock | None = None,
    progress: Progress = lambda *_: None,
    repeat: int = 1,
    output: Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Evaluation:
    """Scores and judges.

    Args:
        scorer: the model.
        questions: at least one.
        task, data: names for the result.
        headline: which latency the run is known by: "strict", "section3" or "inference".
        clock: already running where reading is to be counted; left in the phase `score`.
        progress: see `Scorer.score`.
        repeat: times the inference phase runs; the latencies then count its median.
        output: directory for results.json and samples.jsonl; None writes nothing.
        report: called with the results before they are written, as the last thing that the clock sees.

    Raises:
        UserError, CheckError: see `Scorer.score`.
    """
    clock = clock or Clock()
    scores = scorer.score(questions, clock=clock, progress=progress, repeat=repeat)
    clock.enter("score")
    runtime = scorer.runtime
    samples = [
        judge(question, values, greedy)
        for question, values, greedy in zip(questions, scores.loglikelihoods, scores.greedy, strict=True)
    ]
    if output is not None:
        write_samples(output, samples)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "task": task,
        "questions": len(questions),
        "choices": sum(len(q.choices) for q in questions),
        "truncated_questions": scores.workload.truncated_questions,
        "metrics": metrics(samples),
        **_times(clock, scores.inference_s, headline),
        "inference_s": spread(scores.inference_s),
        "engine": {
            "name": runtime.engine,
            "attention": None if runtime.engine == "reference" else runtime.attention,
            "note": runtime.note,
        },
        "plan": None if scores.workload.plan is None else plan_summary(scores.workload.plan),
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
    results.update(_times(clock, scores.inference_s, headline))
    if output is not None:
        write_results(output, results)
    return Evaluation(results, samples)


def _times(clock: Clock, inference: Sequence[float], headline: str) -> dict[str, Any]:
    """What the results say of the clock, up to now."""
    phases = clock.phases()
    seconds = latencies(phases, inference)
    return {"latency_s": seconds, "headline": {"clock": headline, "seconds": seconds[headline]}, "phases_s": phases}


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
