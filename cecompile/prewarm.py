"""`cecompile warm`: everything compiled before there is a run to wait for it, and the bucket size measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from cecompile.engine.cache import WARM, Entry
from cecompile.errors import CheckError, UserError
from cecompile.runtime import Progress
from cecompile.scorer import Scorer
from cecompile.tasks.question import Question
from cecompile.warming import Ready, useful_tokens_per_second
from cecompile.workload.plan import Bucket, Plan, every_bucket, make_plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import stage_all

GAIN = 1.03  # how much faster than the usual bucket size another must be to be taken


@dataclass(frozen=True, slots=True)
class Warmup:
    """What was built.

    Attributes:
        before: the cache's state before, "warm", "partly warm" or "cold", and why.
        seconds: per bucket, of compiling, running and capturing it.
        bytes: of the cache entry on disk.
        measured: useful tokens a second per bucket size in slots; empty unless asked for.
    """

    before: tuple[str, str]
    seconds: dict[Bucket, float]
    bytes: int
    measured: dict[int, float]


def warm(
    scorer: Scorer,
    questions: Sequence[Question] | None = None,
    *,
    max_depth: int = 1,
    tune: bool = False,
    progress: Progress = lambda *_: None,
) -> Warmup:
    """Compiles and captures every bucket of a plan, and leaves the result in the cache.

    Args:
        scorer: of the model, with the compiled engine.
        questions: what will be scored; or None, for data not yet seen:
        max_depth: tokens of its longest sequence. Every bucket that a plan might use is built then.
        tune: measure bucket sizes on the questions and record the fastest.
        progress: called as (phase, done, total).

    Raises:
        UserError: there is no cache to fill, or see `Scorer.score`.
        CheckError: nothing compiles, or what compiles is wrong.
    """
    runtime = scorer.runtime
    if runtime.engine != "compiled":
        raise UserError(f"--engine {runtime.engine}: nothing to compile")
    entry = runtime.open_cache()
    if entry is None:
        raise UserError(f"{runtime.name}: {runtime.note}")
    runtime.load()
    runtime.probe()
    sequences = None if questions is None else scorer.prepare(questions, fit=True).sequences
    ready = _ready(scorer, sequences, max_depth)
    before = entry.state(ready.buckets)
    measured: dict[int, float] = {}
    if tune and sequences is not None:
        measured = _tune(scorer, entry, sequences, progress)
        ready = _ready(scorer, sequences, max_depth)  # in the size found fastest
    while (warmed := runtime.warm(ready, progress)) is None:
        ready = _ready(scorer, sequences, max_depth)  # memory ran out
    if warmed.name != "compiled":
        raise CheckError(f"{runtime.name}: {warmed.note}")
    if entry.state(ready.buckets)[0] != WARM:
        raise UserError(f"{runtime.name}: {warmed.note}")
    return Warmup(before, warmed.seconds, entry.size(), measured)


def _ready(scorer: Scorer, sequences: Sequences | None, max_depth: int) -> Ready:
    """What to warm up for, with the sizes that the runtime takes now."""
    if sequences is None:
        geometry = scorer.runtime.geometry(max_depth, fit=True)
        return Ready(geometry, every_bucket(geometry))
    plan = scorer.runtime.plan(sequences, fit=True)
    return Ready(plan.geometry, plan.buckets, sequences, list(stage_all(plan)))


def _tune(scorer: Scorer, entry: Entry, sequences: Sequences, progress: Progress) -> dict[int, float]:
    """Measures buckets of a quarter, half, once and twice the usual size, and records the fastest in the entry.

    Returns:
        Useful tokens a second per size in slots, of those that fit.
    """
    runtime = scorer.runtime
    longest, usual = int(sequences.input_lengths.max()), runtime.sizing.tuning.tokens_per_bucket
    measured: dict[int, tuple[float, Plan]] = {}
    for slots in (usual // 4, usual // 2, usual, 2 * usual):
        sizing = runtime.sizing.of_size(slots)
        wanted = sizing.geometry(longest, blocks=runtime.attention == "flex")
        try:
            geometry = sizing.fitting(wanted, longest, runtime.engine)
        except UserError:
            continue  # does not fit
        plan = make_plan(sequences, geometry)
        staged = list(stage_all(plan))
        warmed = runtime.warm(Ready(geometry, plan.buckets, sequences, staged), progress)
        if warmed is not None and warmed.name == "compiled":
            measured[slots] = useful_tokens_per_second(warmed.engine, staged), plan
        warmed = None  # its buffers are freed before the next one's are made
    if measured:
        best = max(measured, key=lambda slots: measured[slots][0] * (GAIN if slots == usual else 1))
        plan = measured[best][1]
        entry.publish(plan.buckets, plan.geometry, tuned=True)
    return {slots: rate for slots, (rate, _) in measured.items()}
