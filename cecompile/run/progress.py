"""Progress of a run, for a display."""

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]  # (phase, done, total)


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
