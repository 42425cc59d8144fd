"""The context of a run: all that accompanies a run but does not change the results."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cecompile.ranks import ALONE, Ranks
from cecompile.results.clock import Clock
from cecompile.results.journal import Journal

Progress = Callable[[str, int, int], None]  # (phase, done, total)


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


class Counter:
    """Counts finished items and reports progress; `done` items are finished from the start."""

    def __init__(self, phase: str, total: int, progress: Progress, done: int = 0) -> None:
        self._phase, self._total, self._progress = phase, total, progress
        self._done = done
        progress(phase, done, total)

    def __call__(self, *_: Any) -> None:
        self.reach(self._done + 1)

    def reach(self, done: int) -> None:
        """Reports that `done` items are finished."""
        self._done = done
        self._progress(self._phase, self._done, self._total)
