"""Interruption: SIGINT and SIGTERM end a command in order, with one line and the shell's exit status for a signal.

Forked children have the default handlers again: a pool ends its workers by SIGTERM, and each has to die of the signal.
"""

import _thread
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

GRACE = 1.0  # seconds after a signal in which another one is ignored
LIMIT = 10.0  # seconds after a signal in which the command has to end; a pool whose workers were killed never does
AGAIN = 0.05  # seconds after which the main thread is sent a signal that it has not handled
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_replaced: list[dict[signal.Signals, Any]] = []  # the handlers before each `signals_raise` under way, outermost first
_fork = _thread.allocate_lock()  # held by the thread amid a fork, and by the process that ends its children
_forking: dict[int, set[Any]] = {}  # the signals that each thread amid a fork blocked before


class Interrupted(KeyboardInterrupt):
    """A signal came while the main thread ran. `status`: the process's exit status, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted ({signal.Signals(number).name})")
        self.status = 128 + number


@contextmanager
def signals_raise() -> Iterator[None]:
    """Lets the first SIGINT or SIGTERM raise `Interrupted`. A later signal ends the process at once.

    The process also ends, with the line of `Interrupted`, where LIMIT seconds after the first signal it still runs.
    Outside the main thread nothing is changed: the program that runs the thread handles signals.
    """
    first: float | None = None
    running = True
    main = _thread.get_ident()

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal first
        if main in _forking:  # an exception raised amid a fork is lost; `watch` sends the signal again
            return
        if first is None:
            first = time.monotonic()
            raise Interrupted(number)
        if time.monotonic() - first > GRACE:
            os._exit(128 + number)

    def watch() -> None:
        """Wakes the main thread: a signal that another thread received does not end the main thread's wait."""
        with os.fdopen(reading, "rb", buffering=0) as arrived:
            while (number := arrived.read(1)[0]) not in _SIGNALS:
                if number == 0:
                    return
            time.sleep(AGAIN)
            while running and first is None:
                signal.pthread_kill(main, number)
                time.sleep(AGAIN)
            time.sleep(LIMIT)
            if running:
                line = f"cecompile: {Interrupted(number)}; ended by force after {LIMIT:.0f} seconds\n"
                os.write(2, line.encode())
                end_children()
                os._exit(128 + number)

    try:
        before = {number: signal.signal(number, handle) for number in _SIGNALS}
    except ValueError:  # not the main thread
        yield
        return
    _replaced.append(before)
    reading, writing = os.pipe()  # Python writes the number of a signal here, whichever thread received the signal
    os.set_blocking(writing, False)
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _thread.start_new_thread(watch, ())
    try:
        yield
    finally:
        running = False
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        if before in _replaced:  # not in a forked child, which shares the pipe
            _replaced.remove(before)
            os.write(writing, b"\0")
        os.close(writing)


def end_children() -> None:
    """Kills the processes that Python code of this process forked and that still run; no more are forked after.

    A pool's thread forks workers in the place of those that died.
    """
    _fork.acquire(timeout=1)  # kept until this process ends
    for name in ("multiprocessing", "multiprocess"):  # the latter is the library that `datasets` takes
        for child in sys.modules[name].active_children() if name in sys.modules else ():
            child.kill()
    for stat in Path("/proc").glob("[0-9]*/stat"):  # one that was forked just now is in no list yet
        with suppress(OSError, ValueError, IndexError):  # a process that has ended meanwhile
            process, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and (stat.parent / "exe").samefile("/proc/self/exe"):
                os.kill(process, signal.SIGKILL)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block once it has taken so long; outside the main thread nothing ends the block.

    The error is raised again each second: templates swallow one that comes while they are compiled.
    """
    over = False

    def out_of_time(number: int, _: FrameType | None) -> None:
        if not over:
            raise TimeoutError(f"not done after {seconds:g} seconds")

    try:
        before = signal.signal(signal.SIGALRM, out_of_time)
    except ValueError:  # not the main thread
        yield
        return
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


def _before_fork() -> None:
    """Blocks the signals: Python forgets those that reach a child before the child's handlers are set."""
    _fork.acquire()
    if _replaced:
        me = _thread.get_ident()
        _forking[me] = set()
        _forking[me] = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork() -> None:
    """Lets the signals through again that `_before_fork` blocked."""
    me = _thread.get_ident()
    if me in _forking:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking[me])
        del _forking[me]
    _fork.release()


def _after_fork_in_child() -> None:
    """Gives a forked child the handlers that this process had before `signals_raise`; then as `_after_fork`."""
    if _replaced:
        signal.set_wakeup_fd(-1)
        for number, handler in _replaced[0].items():
            signal.signal(number, _leave if handler is signal.default_int_handler else handler)
    _replaced.clear()
    _after_fork()
    _forking.clear()


def _leave(number: int, _: FrameType | None) -> None:
    """Ends a forked child as Python's handler of SIGINT does, giving back its locks, but without a traceback."""
    if _forking:  # the child has just begun and holds no lock; an exception raised amid a fork is lost
        os._exit(128 + number)
    raise SystemExit(128 + number)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


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
