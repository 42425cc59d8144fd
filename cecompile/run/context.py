"""The context of a run: all that accompanies a run but does not change the results."""

from dataclasses import dataclass, field

from cecompile.ranks import ALONE, Ranks
from cecompile.results.clock import Clock
from cecompile.results.journal import Journal
from cecompile.run.progress import Progress


@dataclass(frozen=True, slots=True)
class RunContext:
    """The clock, progress display, journal and ranks of one run.

    Attributes:
        clock: books the phases `preprocess`, `load_model`, `warmup` and `inference`.
        progress: called as (phase, done, total).
        journal: stores finished work, and gives back work that an interrupted run finished. None stores nothing.
        repeat: times that the inference phase runs. The journal stores the first.
        ranks: the processes that share the work. A model puts its own ranks here.
    """

    clock: Clock = field(default_factory=Clock)
    progress: Progress = lambda *_: None
    journal: Journal | None = None
    repeat: int = 1
    ranks: Ranks = ALONE
