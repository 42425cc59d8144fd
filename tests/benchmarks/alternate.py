"""Ratios of times that are taken in alternation, so that whatever else the machine does strikes both."""

import time
from collections.abc import Callable

import pytest

LEAST, MOST = 3, 60  # rounds
SETTLED = 3  # rounds in which the ratio has to stay the same,
CHANGE = 0.02  # within this fraction
AT_LEAST = 3.0  # seconds in which to measure


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """A function that calls `run` and returns the seconds taken."""

    def seconds() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return seconds


def ratio(first: Callable[[], float], second: Callable[[], float]) -> float:
    """The least that `first` returns, divided by the least that `second` returns.

    Calls `second` and `first` by turns, until the ratio no longer changes.
    """
    least_first = least_second = float("inf")
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < MOST:
        least_second = min(least_second, second())
        least_first = min(least_first, first())
        found.append(least_first / least_second)
        latest = found[-SETTLED:]
        settled = max(latest) <= (1 + CHANGE) * min(latest)
        if len(found) >= LEAST and settled and time.perf_counter() - began >= AT_LEAST:
            break
    return found[-1]


def assert_at_most(limit: float, first: Callable[[], float], second: Callable[[], float], ratios: bool) -> None:
    """With `ratios`, asserts that `first` takes at most `limit` times as long as `second`; else calls each once.

    In both cases `second` is called before `first`.
    """
    if not ratios:
        second()
        first()
        return
    found = ratio(first, second)
    print(f"ratio {found:.3f}, at most {limit}")  # shown with `pytest -rP`
    if found > limit:
        pytest.fail(f"{found:.3f} times as long, {limit:.3f} at most")
