"""Errors with a message of one line for the user."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class _OneLineError(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UserError(_OneLineError):
    """Bad input or usage; the command line prints the message and exits with status 2."""


class AlreadyReportedError(UserError):
    """A UserError whose message another process has already printed."""


class CheckError(_OneLineError):
    """A result that must not be reported; the command line prints the message and exits with status 1."""


class RecurringError(CheckError):
    """A CheckError that the same run would meet again; the message does not say how to resume."""


@contextmanager
def file_errors(problem: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turns an OSError into an error of one line: the problem, and the system's reason."""
    try:
        yield
    except OSError as error:
        raise kind(f"{problem}: {error.strerror}") from None


def writing(path: object) -> AbstractContextManager[None]:
    """Turns an OSError into a UserError: `path` cannot be written."""
    return file_errors(f"{path}: cannot be written")


def first_line(error: Exception) -> str:
    """The first line of an error's message, and the next line after a colon; the error's kind without a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def printable(text: str, limit: int = 600) -> str:
    """`text` on one line of visible characters: control characters are escaped; a long text loses its middle."""
    if len(text) > 2 * limit:  # escaping makes a text longer, never shorter
        text = text[:limit] + text[-limit:]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return line if len(line) <= limit else line[: limit // 2] + " … " + line[-limit // 2 :]
