"""Rows of CSV and Parquet files, read from the file each time: a copy kept elsewhere could be out of date."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cecompile.errors import UserError, first_line

LONGEST = 1 << 30  # characters in a cell; Python's own limit of 131,072 is less than a long context has
BATCH = 1000  # rows of a Parquet file in memory


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file, every cell as the text that the file holds; None where a row ends early.

    Raises UserError: the file is not CSV in UTF-8, or has no rows.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    with _readable(path, "csv"), path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        header = next(lines, None)
        cells: list[str] | None = None
        for cells in filter(None, lines):
            if len(cells) > len(header or ()):
                raise csv.Error(f"line {lines.line_num} has {len(cells)} cells, the header {len(header or ())}")
            padded = [*cells, *[None] * (len(header or ()) - len(cells))]
            yield dict(reversed([*zip(header or (), padded, strict=True)]))  # of two columns of one name the first
        if cells is None:
            raise csv.Error("no rows below the header" if header else "empty")


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file. Raises UserError: the file is no Parquet file, or pyarrow cannot be imported."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path}: read by the library pyarrow, which fails: {first_line(error)}") from None
    with _readable(path, "parquet", ArrowException), path.open("rb") as file, parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(BATCH):
            yield from batch.to_pylist()


@contextmanager
def _readable(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns the errors of a library into UserError."""
    known: tuple[type[Exception], ...] = (csv.Error, OSError, ValueError, OverflowError, *errors)
    try:
        yield
    except known as error:
        raise UserError(f"{path}: not readable as {kind}: {first_line(error)}") from None
