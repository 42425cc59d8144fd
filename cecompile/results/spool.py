"""Samples on disk while a run goes on, for more of them than memory holds."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from cecompile.errors import UserError


class Spool:
    """Samples in a file without a name, which goes when the process does; each time one goes through them, read back.

    Args:
        directory: where the file is, or in the nearest one above that exists; None is where temporary files are.
        kind: of sample, a dataclass of plain JSON values and tuples of them.

    Raises:
        UserError: the file system refuses.
    """

    def __init__(self, directory: Path | None, kind: type) -> None:
        while directory is not None and not directory.exists():
            directory = directory.parent
        self._where = tempfile.gettempdir() if directory is None else str(directory)
        self._kind = kind
        self._count = 0
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        except OSError as error:
            raise self._refusal(error) from None

    def add(self, samples: Iterable[Any]) -> None:
        """Appends samples. Raises UserError: the file system refuses."""
        try:
            self._file.seek(0, os.SEEK_END)
            for sample in samples:
                self._file.write(line(sample))
                self._count += 1
            self._file.flush()
        except OSError as error:
            raise self._refusal(error) from None

    def lines(self) -> Iterator[bytes]:
        """The samples as lines of samples.jsonl."""
        self._file.seek(0)
        yield from self._file

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for one in self.lines():
            values = json.loads(one)
            yield self._kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def _refusal(self, error: OSError) -> UserError:
        return UserError(f"{self._where}: cannot be written: {error.strerror}")


def line(sample: Any) -> bytes:
    """A sample as a line of samples.jsonl."""
    return json.dumps(dataclasses.asdict(sample)).encode() + b"\n"
