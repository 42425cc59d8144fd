"""The command line as a shell starts it: with standard output that is full, closed, a pipe, or of another encoding."""

import os
import runpy
import sys

PLACES = ("full", "closed pipe", "closed", "pipe that is full")


def command_to(place: str, encoding: str, *arguments: str) -> None:
    """Runs `cecompile` with standard output in a place; for `forked.run`."""
    sys.stdout.reconfigure(encoding=encoding, errors="strict")
    if place == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif place == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    elif place == "closed":
        os.close(1)
    elif place == "pipe that is full":
        _slow_pipe()
    sys.argv = ["cecompile", *arguments]
    runpy.run_module("cecompile", run_name="__main__", alter_sys=True)


def _slow_pipe() -> None:
    """Makes standard output a pipe that does not wait; a process reads it slowly and prints what it read."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            while part := pipe.read(1000):
                os.write(1, part)
        os._exit(0)
    os.close(reader)
    os.set_blocking(writer, False)
    os.dup2(writer, 1)
    os.close(writer)
