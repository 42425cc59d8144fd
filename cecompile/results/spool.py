"""Keeps samples on disk while a run goes on, for more samples than memory holds."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from cecompile.errors import writing


class Spool:
    """Samples in a file without a name, which disappears with the process. Iterating reads the file again each time.

    Args:
        directory: of the file, or the nearest directory above that exists; None is the one of temporary files.
        kind: of sample, a dataclass of plain JSON values and tuples of them.

    Raises:
        UserError: the file system refuses.
    """

    def __init__(self, directory: Path | None, kind: type) -> None:
        while directory is not None and not directory.exists():
            directory = directory.parent
        self._where = directory or tempfile.gettempdir()
        self._kind = kind
        self._count = 0
        with writing(self._where):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115

    def add(self, samples: Iterable[Any]) -> None:
        """Appends samples. Raises UserError: the file system refuses."""
        with writing(self._where):
            self._file.seek(0, os.SEEK_END)
            for sample in samples:
                self._file.write(line(sample))
                self._count += 1
            self._file.flush()

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


def line(sample: Any) -> bytes:
    """A sample as a line of samples.jsonl, without fields that are empty in most formats."""
    values = dataclasses.asdict(sample)
    given = {f.name: values[f.name] for f in dataclasses.fields(sample) if values[f.name] != f.default}
    return json.dumps(given).encode() + b"\n"
