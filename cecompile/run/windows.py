"""A run over questions in windows: the same warm engine runs window after window, and the results are added up.

Sequences share prefixes within a window. A window's passes have the shapes of those before, as long as these hold its
sequences; otherwise there is a further warm-up.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cecompile.results.compare import values_by_metric
from cecompile.results.spool import Spool
from cecompile.run.context import RunContext
from cecompile.run.language_model import LanguageModel
from cecompile.tasks.judge import metrics_of
from cecompile.tasks.windows import Windows
from cecompile.workload.plan import Plan
from cecompile.workload.totals import Totals


@dataclass(frozen=True, slots=True)
class Judged:
    """A run's outcome.

    Attributes:
        samples: in the order of the questions.
        facts: the samples' entries in results.json.
        plan: None for the reference engine.
        inference_s: seconds of each run of the inference phase.
        warm_moments: see `Warmup.moments`.
    """

    samples: list[Any] | Spool
    facts: dict[str, Any]
    plan: Plan | Totals | None
    inference_s: list[float]
    warm_moments: dict[str, float]


Judge = Callable[[Any, Any, RunContext], Judged]  # (model, questions, run)


def run_in_windows(
    judge: Judge, model: LanguageModel, windows: Windows, run: RunContext, output: Path | None
) -> Judged:
    """Runs and judges window by window.

    Memory does not grow with the number of windows, but for a byte a question, or eight where a metric is no fraction
    of right answers.

    Args:
        judge: runs and judges the questions of one window.
        model, run: for `judge`. Progress is also shown as ("windows", done, number).
        output: the directory that keeps the samples until they are written; None keeps them elsewhere on disk.

    Raises:
        UserError: see `judge`; or the file system refuses.
    """
    clock, progress = run.clock, run.progress
    if run.journal is not None:
        run.journal.expect({"window": windows.size})
    facts: dict[str, Any] = {}
    spool: Spool | None = None
    totals: Totals | None = None
    seconds = [0.0] * run.repeat
    moments: dict[str, float] = {}
    values: dict[str, array[Any] | None] = {}
    reading, number = iter(windows), 0
    with model.runtime.planner.same_shapes():
        clock.enter("preprocess")
        while (questions := next(reading, None)) is not None:
            progress("windows", number, windows.number)
            number += 1
            judged = judge(model, questions, run)
            samples = list(judged.samples)
            spool = Spool(output, type(samples[0])) if spool is None else spool
            spool.add(samples)
            _add(values, samples)
            facts = _added(facts, judged.facts)
            if isinstance(judged.plan, Plan):
                totals = Totals.of(judged.plan) if totals is None else totals.and_then(judged.plan)
            seconds = [a + b for a, b in zip(seconds, judged.inference_s, strict=True)]
            moments |= judged.warm_moments
            del questions, judged, samples  # before the next ones are read
            clock.enter("preprocess")
    progress("windows", number, windows.number)
    clock.enter("score")
    assert spool is not None
    facts["metrics"] = metrics_of({name: [None] if some is None else some for name, some in values.items()})
    return Judged(spool, facts, totals, seconds, moments)


def plan_in_windows(model: LanguageModel, questions: Sequence[Any] | Windows, fit: bool) -> tuple[Plan | Totals, int]:
    """The plan of all questions, and how many sequences it packs. Raises UserError: see `LanguageModel.prepare`."""
    if not isinstance(questions, Windows):
        workload = model.prepare(questions, fit=fit)
        assert workload.plan is not None
        return workload.plan, len(workload.sequences)
    totals: Totals | None = None
    sequences = 0
    with model.runtime.planner.same_shapes():
        for window in questions:
            workload = model.prepare(window, fit=fit)
            assert workload.plan is not None
            totals = Totals.of(workload.plan) if totals is None else totals.and_then(workload.plan)
            sequences += len(workload.sequences)
            del window, workload
    assert totals is not None
    return totals, sequences


def _add(values: dict[str, "array[Any] | None"], samples: Sequence[Any]) -> None:
    """Appends what samples add to each metric; None where a sample has no gold answer."""
    for metric, some in values_by_metric(samples).items():
        held = values.setdefault(metric, array("d" if isinstance(some[0], float) else "b"))
        if held is None or None in some:
            values[metric] = None
        else:
            held.extend(some)


def _added(facts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Adds a window's facts to those of the windows before; `metrics` are the last window's."""
    if not facts:
        return more
    out = dict(more)
    for name in {"choices", "truncated_questions"} & more.keys():
        out[name] = facts[name] + more[name]
    if "answers" in more:
        counts = {k: v if v is None else facts["answers"][k] + v for k, v in more["answers"].items()}
        out["answers"] = counts | {"max_new_tokens": more["answers"]["max_new_tokens"]}
    return out
