"""`cecompile warm`: compiles everything before a run, and measures bucket sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cecompile.compile_cache.store import WARM, Entry, ProbeResult
from cecompile.errors import CheckError, UserError
from cecompile.run.context import Progress
from cecompile.run.engine_builder import useful_tokens_per_second
from cecompile.run.language_model import LanguageModel
from cecompile.run.preflight import check_before_loading
from cecompile.tasks.windows import Windows
from cecompile.workload.plan import Plan, every_bucket
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPlan

GAIN = 1.03  # how much faster than the usual bucket size another must be to be taken


@dataclass(frozen=True, slots=True)
class CacheBuild:
    """The outcome of `warm`.

    Attributes:
        before: the cache's state before, "warm", "partly warm" or "cold", and the reason.
        seconds: time to compile, run and capture each fixed shape, by the shape in words.
        bytes: size of the cache entry on disk.
        measured: useful tokens a second per bucket size in slots; empty unless asked for.
    """

    before: tuple[str, str]
    seconds: dict[str, float]
    bytes: int
    measured: dict[int, float]


def warm(
    model: LanguageModel, questions: Sequence[Any] | Windows | None = None, *, max_depth: int = 1, tune: bool = False,
    progress: Progress = lambda *_: None,
) -> CacheBuild:  # fmt: skip
    """Compiles and captures every bucket of a plan, and leaves the result in the cache.

    Args:
        model: a scorer or an answerer, with the compiled engine.
        questions: the questions to come, of windows the first; None is for data not yet seen.
        max_depth: tokens of the longest sequence of data not yet seen. Every bucket that a plan might use is built.
        tune: measure bucket sizes on the questions and record the fastest.
        progress: called as (phase, done, total).

    Raises:
        UserError: there is no cache to fill, or see `Scorer.score`.
        CheckError: nothing compiles, or what compiles is wrong.
    """
    runtime = model.runtime
    if isinstance(questions, Windows):
        with runtime.planner.same_shapes():
            return warm(model, next(iter(questions)), tune=tune, progress=progress)
    if runtime.mode.engine != "compiled":
        raise UserError(f"--engine {runtime.mode.engine}: nothing to compile; leave out --engine")
    entry = runtime.warmup.open_cache()
    if entry is None:
        raise UserError(f"{runtime.name}: {runtime.mode.note}")
    workload = None if questions is None else model.prepare(questions, fit=True)  # before memory holds the weights
    sequences = None if workload is None else workload.sequences
    if workload is not None and workload.plan is not None:
        ready = StagedPlan.for_plan(workload.plan, workload.sequences)
    else:
        ready = _ready(model, None, max_depth)
    check_before_loading(runtime, ready)
    before = entry.state(ready.compiled)
    while runtime.warmup.lacks(ready) and runtime.warmup.compile_apart(ready, progress):
        ready = _ready(model, sequences, max_depth)
    runtime.load()
    if runtime.warmup.probe():
        ready = _ready(model, sequences, max_depth)
    entry = runtime.warmup.entry or entry  # opened anew after compiling apart
    measured: dict[int, float] = {}
    if tune and sequences is not None:
        measured = _tune(model, entry, sequences, progress)
        ready = _ready(model, sequences, max_depth)  # in the size found fastest
    while (warmed := runtime.warmup.warm(ready, progress)) is None:
        ready = _ready(model, sequences, max_depth)  # memory ran out
    if warmed.name != "compiled":
        raise CheckError(f"{runtime.name}: {warmed.note}")
    if entry.state(ready.compiled)[0] != WARM:
        raise UserError(f"{runtime.name}: {warmed.note}")
    return CacheBuild(before, warmed.seconds, entry.size(), measured)


def _ready(model: LanguageModel, sequences: Sequences | None, max_depth: int) -> StagedPlan:
    """Returns the buckets to warm up, in the planner's present sizes."""
    if sequences is None:
        answer = max_depth + model.new_tokens if model.new_tokens else 0
        geometry, decoding = model.runtime.planner.shapes(max_depth, answer, fit=True)
        return StagedPlan(geometry, every_bucket(geometry), decoding)
    return StagedPlan.for_plan(model.runtime.planner.plan(sequences, True, model.new_tokens), sequences)


def _tune(model: LanguageModel, entry: Entry, sequences: Sequences, progress: Progress) -> dict[int, float]:
    """Measures buckets of a quarter, half, once and twice the usual size, and records the fastest in the entry.

    Returns:
        Useful tokens a second per size in slots, of those that fit.
    """
    runtime = model.runtime
    usual = runtime.planner.sizing.tuning.tokens_per_bucket
    measured: dict[int, tuple[float, Plan, ProbeResult]] = {}
    for slots in (usual // 4, usual // 2, usual, 2 * usual):
        try:
            plan = runtime.planner.plan(sequences, True, model.new_tokens, runtime.planner.sizing.of_size(slots))
        except UserError:
            continue  # does not fit
        ready = StagedPlan.for_plan(plan, sequences)
        warmed = runtime.warmup.warm(ready, progress)
        if warmed is not None and warmed.name == "compiled":
            measured[slots] = useful_tokens_per_second(warmed.engine, ready.staged), plan, warmed.found
        warmed = None  # its buffers are freed before the next one's are made
    if measured:
        best = max(measured, key=lambda slots: measured[slots][0] * (GAIN if slots == usual else 1))
        _, plan, found = measured[best]
        entry.publish(plan.compiled, plan.geometry, found, tuned=True)
    return {slots: rate for slots, (rate, _, _) in measured.items()}
