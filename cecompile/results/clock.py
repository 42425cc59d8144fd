"""The clock: every moment of a run belongs to exactly one phase.

Entering a phase ends the one before, so the phases' sum is the wall time by construction. Work that overlaps is
booked once, on the phase that was entered: compiling beside the reading of weights is `load_model` until they are read,
and `warmup` from then on.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cecompile.procfs import process_age

PHASES = ("load_model", "preprocess", "warmup", "inference", "score")
CLOCKS = ("strict", "section3", "inference")


def process_start() -> float:
    """When this process began, on the scale of `time.perf_counter()`; now, where the system does not say."""
    return time.perf_counter() - (process_age() or 0.0)


class Clock:
    """Attributes wall time (monotonic, seconds) to phases; a phase may be entered more than once."""

    def __init__(self, started: float | None = None) -> None:
        """`started`: the `time.perf_counter()` at which the first phase, `load_model`, began; else now."""
        self._started = self._since = time.perf_counter() if started is None else started
        self._phase = PHASES[0]
        self._timeline: list[tuple[str, float, float]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str, at: float | None = None) -> None:
        """Ends the current phase and begins `phase`, one of PHASES.

        `at`: when that was, by `time.perf_counter()`, where it is known only now; not before the current one began.
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
        """Every phase as it was booked up to the last call: name, begin and end in seconds since the first began."""
        return list(self._timeline)

    def since_start(self, moments: Mapping[str, float]) -> list[tuple[str, float]]:
        """Named moments of `time.perf_counter()`, in seconds since the first phase began; without those before it."""
        return [(name, at - self._started) for name, at in moments.items() if at >= self._started]


def latencies(phases: Mapping[str, float], inference: Sequence[float]) -> dict[str, float]:
    """The three latencies, in seconds, from the phases' seconds.

    strict: everything but preprocessing, as the contest's rules say. section3: reading, preprocessing and inference,
    as the 2024 contest's script timed. inference: that phase alone. Where inference ran several times, its median
    counts, as if it had run once.

    Args:
        phases: the clock's; they hold every run.
        inference: seconds of each run.
    """
    once = phases["inference"] if len(inference) == 1 else statistics.median(inference)
    return {
        "strict": sum(phases.values()) - phases["preprocess"] - phases["inference"] + once,
        "section3": phases["preprocess"] + once,
        "inference": once,
    }


def spread(inference: Sequence[float]) -> dict[str, Any]:
    """How far repeated runs of the inference phase are apart: their number, median, least and most, in seconds."""
    return {
        "runs": len(inference),
        "median": statistics.median(inference),
        "min": min(inference),
        "max": max(inference),
    }
