"""Interruption: SIGINT and SIGTERM end a command in order, with one line and the shell's exit status for a signal."""

import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

GRACE = 1.0  # seconds after a signal in which another one is ignored


class Interrupted(KeyboardInterrupt):
    """A signal came while the main thread ran. `status`: the process's exit status, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted ({signal.Signals(number).name})")
        self.status = 128 + number


@contextmanager
def signals_raise() -> Iterator[None]:
    """Lets the first SIGINT or SIGTERM raise `Interrupted`. A later signal ends the process at once."""
    first: float | None = None

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise Interrupted(number)
        if time.monotonic() - first > GRACE:
            os._exit(128 + number)

    before = {}
    with suppress(ValueError):  # not the main thread: the program that runs this thread handles signals
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_to_resume(arguments: Sequence[str], output: Path, stages: int = 1) -> str:
    """The command line that continues an interrupted command, which needs at least `stages` processes.

    `arguments` are the interrupted command's, without the program's name. `output` is its result directory.
    """
    start = ["cecompile"] if stages == 1 else ["torchrun", "--nproc-per-node", str(stages), "-m", "cecompile"]
    kept = [a for a in arguments if a not in ("--overwrite", "--resume")]
    if not any(a == "--output" or a.startswith("--output=") for a in kept):
        kept += ["--output", str(output)]
    return " ".join(map(_quoted, (*start, *kept, "--resume")))


def _quoted(argument: str) -> str:
    """An argument quoted for a shell, with unprintable characters as bytes."""
    if argument.isprintable():
        return shlex.quote(argument)
    plain = (chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(argument))
    return f"$'{''.join(plain)}'"
