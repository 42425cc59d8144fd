"""Errors of the file system while results are written, told in one line."""

import contextlib
from collections.abc import Iterator

from cecompile.errors import UserError


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """Turns an OSError into a UserError: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
