"""Standard output and standard error that never fail: a result must not be lost because a line cannot be printed.

The first error of a stream is remembered, and all later text is dropped. Libraries print through these streams too.
"""

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

CLOSED = (errno.EPIPE, errno.ECONNRESET)  # the reader of a pipe or a connection wants no more


class _Forgiving(io.FileIO):
    """A file that drops all text once writing has failed; `failure` is the error."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left and self.failure is None:
            try:
                written = super().write(left)
            except OSError as error:
                self.failure = error
                break
            if written is None:  # a reader that does not keep up, on a stream that does not wait
                select.select([], [self], [])
            left = left[written or 0 :]
        return size


def open_all() -> None:
    """Opens /dev/null in the place of a standard stream that is closed, so that no other file gets the number."""
    while True:
        file = os.open(os.devnull, os.O_RDWR)
        if file > 2:
            os.close(file)
            return
        os.set_inheritable(file, True)


def never_fail() -> None:
    """Replaces `sys.stdout` and `sys.stderr`. A character that the encoding lacks gets a substitute."""
    open_all()
    sys.stdout = _stream(sys.stdout, 1, "replace")
    sys.stderr = _stream(sys.stderr, 2, "backslashreplace")


def failure() -> OSError | None:
    """The error by which text for standard output was lost; None for a pipe whose reader wanted no more."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.failure if isinstance(raw, _Forgiving) else None
    return None if error is None or error.errno in CLOSED else error


def flush() -> None:
    """Writes all text that is still held back."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _stream(before: TextIO | None, number: int, errors: str) -> TextIO:
    """A stream for a file descriptor, in the encoding of the stream before."""
    if before is not None:
        with suppress(OSError):
            before.flush()
    file = _Forgiving(number, "w", closefd=False)
    lines = number == 2 or file.isatty() or bool(getattr(before, "write_through", False))
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=encoding, errors=errors, line_buffering=lines)
