"""How long tests wait, and for events that other processes bring about."""

import subprocess
import time
from collections.abc import Callable

HANG = 600  # seconds after which a process is taken to hang: a limit that ends a test, and is no part of any


def wait_until(happened: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Waits for an event that `processes` bring about; fails if one of them ends before."""
    limit = time.monotonic() + HANG
    while True:
        ended = [process.args for process in processes if process.poll() is not None]
        if happened():
            return
        assert not ended, "ended before the event"
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.005)
