"""Reading datasets: local JSONL, JSON, Parquet and CSV files, and hub ids."""

import codecs
import functools
import itertools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cecompile.errors import UserError, file_errors, first_line
from cecompile.tasks.formats import detect, to_question
from cecompile.tasks.tables import csv_rows, parquet_rows
from cecompile.tasks.windows import Windows, split

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%+-]+))?")
SPLITS = ("validation", "test", "train")
JSON, TABLES = (".jsonl", ".ndjson", ".json"), (".parquet", ".csv")


@dataclass(frozen=True, slots=True)
class Dataset:
    """The questions in the order of the file, whole or in windows: `ChatQuestion` for "chat", else `Question`.

    `note` says how rows were read that have the fields of two formats; else None.
    """

    task: str
    questions: list[Any] | Windows
    note: str | None = None


def read_questions(data: str | Path, task: str = "auto", limit: float | None = None) -> list[Any]:
    """The questions of a dataset; see `read_dataset`."""
    return list(read_dataset(data, task, limit).questions)


def read_dataset(data: str | Path, task: str = "auto", limit: float | None = None) -> Dataset:
    """Reads and checks every row of a dataset.

    Args:
        data: a .jsonl, .json, .parquet or .csv file, or a hub id `owner/name[/config][:split]`.
        task: "auto" recognises the format from the fields; one of `formats.TASKS` narrows the formats down.
        limit: the number of questions to keep, the first ones; below 1, the fraction of questions, rounded up.

    Returns:
        The questions, at least one. Either all questions have labels, or none has.

    Raises:
        UserError: the data cannot be read, or a row is not a question; names the file, the line and the field.
    """
    rows = _Reading(data, task, limit)
    questions = list(rows)
    return Dataset(rows.task, questions[: _kept(len(questions), limit)], rows.note)


def read_windows(data: str | Path, task: str, limit: float | None, window: int) -> Dataset:
    """Like `read_dataset`, but keeps no more than `window` questions: all are checked, and read again when needed.

    A .json array is parsed as a whole each time. Hub datasets are converted into files of the cache of the `datasets`
    library, which maps these files into memory. Args, raises: see `read_dataset`.
    """
    rows = _Reading(data, task, limit)
    windows = split(rows, window)
    read = list(itertools.islice(windows, 2))
    if len(read) == 1:
        return Dataset(rows.task, read[0][: _kept(len(read[0]), limit)], rows.note)
    first = (read.pop(0) for _ in range(2))  # so that the windows do not stay in memory
    again = functools.partial(_Reading, data, task, limit, rows.state)
    surveyed = Windows.surveyed(str(data), window, itertools.chain(first, windows), again)
    if limit is not None and limit < 1:
        return read_windows(data, task, _kept(len(surveyed), limit), window)
    return Dataset(rows.task, surveyed, rows.note)


def is_limit(limit: float | None) -> bool:
    """Whether a limit is a count of questions, a fraction between 0 and 1, or None."""
    return limit is None or 0 < limit < 1 or (limit >= 1 and (isinstance(limit, int) or limit.is_integer()))


def _kept(count: int, limit: float | None) -> int:
    """The number of questions to keep of `count`."""
    return math.ceil(count * limit) if limit is not None and limit < 1 else count


class _Reading:
    """Iterates over a dataset's rows as questions, and raises UserError as `read_dataset` does.

    `limit`: the most rows to read; ignored below 1. `state`: the file's state when read before. `task`: the task of the
    rows' format, once all rows were read.
    """

    def __init__(self, data: str | Path, task: str, limit: float | None, state: tuple[int, ...] | None = None) -> None:
        self.task = task
        self.note: str | None = None
        self.state = state or _state(data)
        self._data = data
        if not is_limit(limit):
            raise UserError(f"limit {limit}: neither a count of questions nor a fraction between 0 and 1")
        self._last = min(int(limit), sys.maxsize) if limit is not None and limit >= 1 else None

    def __iter__(self) -> Iterator[Any]:
        self._check_state()
        fmt, labelled = None, None
        for position, (where, row) in enumerate(itertools.islice(_rows(self._data), self._last)):
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object, found a JSON {type(row).__name__}")
            fmt = fmt or detect(row, self.task, where)
            question = to_question(row, fmt, where, position)
            if labelled not in (None, question.label is not None):
                fault = "missing, though earlier rows have one" if labelled else "given, unlike earlier rows"
                raise UserError(f"{where}: field '{fmt.label[0]}': {fault}")
            labelled = question.label is not None
            yield question
        self._check_state()
        if fmt is None:
            raise UserError(f"{self._data}: no rows")
        self.note = fmt.note(self.task)
        self.task = fmt.task

    def _check_state(self) -> None:
        if _state(self._data) != self.state:
            raise UserError(f"{self._data}: changed while it was read")


def _state(data: str | Path) -> tuple[int, ...] | None:
    """Facts of a file that change when the file does; None without a file.

    The time of modification alone may be set back, as by `cp -p` and `tar`.
    """
    with suppress(OSError, ValueError):
        found = Path(data).stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return None


def _rows(data: str | Path) -> Iterator[tuple[str, Any]]:
    """Pairs of (place for messages, row)."""
    path, suffix = Path(data), Path(data).suffix.lower()
    with file_errors(f"{data}: cannot be read"):
        is_file, is_directory, exists = path.is_file(), path.is_dir(), path.exists()
    if is_file and suffix in JSON:
        return _json_rows(path)
    if is_file and suffix in TABLES:
        return _table_rows(path, suffix[1:])
    if is_file:
        raise UserError(f"{path}: unknown file type '{path.suffix}'; .jsonl, .json, .parquet and .csv are read")
    if is_directory:
        raise UserError(f"{path}: is a directory; name one file in it")
    if exists:
        raise UserError(f"{path}: neither a file nor a directory; save it as a file")
    match = HUB_ID.fullmatch(str(data))
    if match is None or suffix in JSON + TABLES:
        raise UserError(f"{data}: no such file")
    return _hub_rows(str(data), match["name"], match["config"], match["split"])


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            content = file.read()
            rows = _parse(content, str(path) if b"\n" in content else f"{path}: line 1")
            yield from ((f"{path}: item {number}", row) for number, row in enumerate(rows, 1))
            return
        for number, line in enumerate(file, 1):
            where = f"{path}: line {number}"
            if line.strip():
                yield where, _parse(line, where)


def _open(path: Path) -> Any:
    with file_errors(f"{path}: cannot be read"):
        return path.open("rb")


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not valid JSON at {place}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # e.g. a number of more digits than Python converts
        raise UserError(f"{where}: not valid JSON: {error}") from None


@contextmanager
def _datasets(data: str) -> Iterator[tuple[Any, str | None]]:
    """Gives the library `datasets`, without progress bars, and the directory in which to convert files.

    The directory is temporary where the user's cache cannot be written, as without a home directory; else None, for the
    library's own, which goes by the revision on the hub. Raises UserError: the library cannot be imported, say with a
    pyarrow too new for the installed NumPy.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{data}: read by the library datasets, which fails: {first_line(error)}") from None
    cache = Path(datasets.config.HF_DATASETS_CACHE).absolute()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    with ExitStack() as stack:
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        if os.access(existing, os.W_OK | os.X_OK):
            yield datasets, None
        else:
            yield datasets, stack.enter_context(tempfile.TemporaryDirectory(prefix="cecompile-tables-"))


def _table_rows(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    _open(path).close()
    rows = csv_rows(path) if kind == "csv" else parquet_rows(path)
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _hub_rows(data: str, name: str, config: str | None, split: str | None) -> Iterator[tuple[str, Any]]:
    with _datasets(data) as (datasets, place):
        try:
            if split is None:
                found = datasets.get_dataset_split_names(name, config, cache_dir=place)
                split = next((s for s in SPLITS if s in found), found[0])
            table = datasets.load_dataset(name, config, split=split, cache_dir=place)
        except Exception as error:  # the hub client raises many kinds: offline, not found, gated, malformed
            raise UserError(f"{data}: neither a file nor a dataset that loads: {error}") from None
        yield from ((f"{data}: row {number}", row) for number, row in enumerate(table, 1))
