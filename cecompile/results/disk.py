"""The file system beneath results: its errors, told in one line, and which paths are one file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cecompile.errors import UserError


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Turns an OSError into a UserError: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, or would if the file were there."""
    with contextlib.suppress(OSError, ValueError):
        if one.samefile(other):
            return True
    with contextlib.suppress(OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)
    return False  # not even a path
