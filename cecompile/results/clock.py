"""The clock: books every moment of a run on exactly one phase.

Entering a phase ends the phase before, so the sum of the phases is the wall time by construction. Work that overlaps is
booked once, on the phase that was entered: compiling while weights are read is `load_model` until they are read, and
`warmup` from then on.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cecompile.procfs import process_age

PHASES = ("load_model", "preprocess", "warmup", "inference", "score")
CLOCKS = ("strict", "section3", "inference")


def process_start() -> float:
    """The moment this process began, by `time.perf_counter()`; now, where the system does not say."""
    return time.perf_counter() - (process_age() or 0.0)


class Clock:
    """Attributes wall time (monotonic, seconds) to phases; a phase may be entered more than once."""

    def __init__(self, started: float | None = None) -> None:
        """Begins the first phase, `load_model`, at `started` by `time.perf_counter()`, by default now."""
        self._started = self._since = time.perf_counter() if started is None else started
        self._phase = PHASES[0]
        self._timeline: list[tuple[str, float, float]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str, at: float | None = None) -> None:
        """Ends the current phase and begins `phase`, one of PHASES.

        `at`: the moment by `time.perf_counter()`, by default now; not before the current phase began.
        """
        now = time.perf_counter() if at is None else at
        self._seconds[self._phase] += now - self._since
        goes_on = bool(self._timeline) and self._timeline[-1][0] == self._phase
        began = self._timeline.pop()[1] if goes_on else self._since - self._started
        self._timeline.append((self._phase, began, now - self._started))
        self._since, self._phase = now, phase

    def phases(self) -> dict[str, float]:
        """Seconds of each phase up to now."""
        self.enter(self._phase)
        return dict(self._seconds)

    def timeline(self) -> list[tuple[str, float, float]]:
        """Every phase booked up to the last call: name, begin and end in seconds since the first phase began."""
        return list(self._timeline)

    def since_start(self, moments: Mapping[str, float]) -> list[tuple[str, float]]:
        """Named moments of `time.perf_counter()`, in seconds since the first phase began; earlier ones are left out."""
        return [(name, at - self._started) for name, at in moments.items() if at >= self._started]


def latencies(phases: Mapping[str, float], inference: Sequence[float]) -> dict[str, float]:
    """The three latencies, in seconds, from the seconds of the phases.

    strict: all phases but preprocessing, as the contest's rules say. section3: reading, preprocessing and inference, as
    the 2024 contest's script timed. inference: the inference phase alone. Of repeated inference the median counts, as
    if inference had run once.

    Args:
        phases: of the clock, every repetition included.
        inference: seconds of each repetition.
    """
    once = phases["inference"] if len(inference) == 1 else statistics.median(inference)
    return {
        "strict": sum(phases.values()) - phases["preprocess"] - phases["inference"] + once,
        "section3": phases["preprocess"] + once,
        "inference": once,
    }


def spread(runs: Sequence[float]) -> dict[str, Any]:
    """The number, median, least and most of the seconds that each run of the inference phase took."""
    return {"runs": len(runs), "median": statistics.median(runs), "min": min(runs), "max": max(runs)}
