"""The journal of a run: appends each finished part, so that an interrupted run can go on from there.

    MAGIC
    record 0     the header, JSON: the facts that the run depends on, and when the run began
    record 1...  a finished part of the run each: its kind, its index, its bytes

A run in windows counts the indices of each window anew; `begin` begins the next window. Every window but the first has
a record of its own with the facts that the window depends on.

A record is a head (kind, index, length of the payload, digest over those three, the record's place and the payload)
and the payload. Records are only ever appended, by one process at a time, so that a process may be killed at any
moment. Reading ends at the first record that is cut off or damaged, and writing goes on from there.

Where several ranks share a run, each has a journal of its own; any number of ranks goes on with all journals there.

This module does not know the meaning of the records.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cecompile.errors import UserError, writing
from cecompile.ranks import ALONE, Ranks

NAME = ".journal.partial"  # of rank 0; rank 1 has .journal-1.partial
PASSES, ANSWERS, WINDOW = "passes", "answers", "window"  # the kinds of records
SYNC = 5.0  # seconds between two waits for the disk, at least

_MAGIC = b"cecompile journal 1\n"
_KINDS = ("header", PASSES, ANSWERS, WINDOW)
_NAMES = re.compile(r"\.journal(-[1-9][0-9]*)?\.partial")
_HEAD = struct.Struct("<IIQ16s")  # kind and, from bit 8 on, window; index; payload's length; digest
ATTEMPTS = 100  # to open a file that other processes remove
_CLOSED = -1

Record = tuple[str, int, bytes, int]  # kind, index with its window from bit 32 on, payload, end in the file


def journals_in(directory: Path) -> list[Path]:
    """The journals of all ranks in a directory, but for empty ones; none where the directory is missing."""
    try:
        return [path for path in _named(directory) if path.lstat().st_size]
    except OSError:
        return []


def _named(directory: Path) -> list[Path]:
    """The files of a directory that are named as journals."""
    return sorted(path for path in directory.iterdir() if is_journal(path.name)) if directory.is_dir() else []


def is_journal(name: str) -> bool:
    """Whether a file's name is a journal's."""
    return _NAMES.fullmatch(name) is not None


class Journal:
    """A result directory's journal, as one rank writes it and all ranks read it.

    Args:
        directory: of the results; made for rank 0's journal, which is open from the start: the lock on this file keeps
            other runs out of the directory, and disappears with the process.
        resume: go on with the journals in `directory`; otherwise they are replaced when this journal begins.
        ranks: the ranks that write journals at the same time; all make, begin and end theirs together.
        replace: results that another run has written to `directory` in the meantime may be replaced.

    Attributes:
        replaces: see `replace`; also true where the resumed run may.
        begun: whether the facts that the run depends on were complete, and the same as those of the resumed run.

    Raises:
        UserError: there is no run to resume, a journal is damaged from its beginning on, or another process is writing
            it.
    """

    def __init__(self, directory: Path, resume: bool = False, ranks: Ranks = ALONE, *, replace: bool = True) -> None:
        self.directory, self.replaces, self.begun = directory, replace, False
        self.path = directory / (f".journal-{ranks.rank}.partial" if ranks.rank else NAME)
        self._ranks, self._file = ranks, _CLOSED
        self._made: list[Path] = []  # directories, innermost first
        self._facts: dict[str, Any] = {}
        self._headers: list[dict[str, Any]] = []  # of the journals that are resumed
        self._from: str | None = None  # when the resumed run began
        self._found: list[Path] = []  # the resumed journals
        self._kept: dict[tuple[str, int], bytes] = {}  # the records of all ranks
        self._synced = time.monotonic()
        self._owned = 0  # records that were in this rank's file already
        self._added = self._window = self._size = 0
        self._earlier = False  # the file is an earlier run's, until this journal begins
        if resume:
            self._open_to_resume()
        elif ranks.restarts:
            _discard(directory, ranks, None)  # a rank that is started again could not tell old journals from this run's
        ranks.first_does(self._occupy)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def resumable(self) -> bool:
        """Whether the files on disk hold records that a later run can go on with."""
        if (self._owned or self._added) and self.path.exists():
            return True
        others = journals_in(self.directory) if self.begun or self._from else []
        return any(_has_records(path) for path in others if path != self.path)

    @property
    def resumed(self) -> dict[str, Any] | None:
        """The number of records taken over, by kind, and `from`: when their run began; None without such records."""
        if self._from is None or not self._kept:
            return None
        counts = {kind: sum(k == kind for k, _ in self._kept) for kind in (PASSES, ANSWERS)}
        return {kind: n for kind, n in counts.items() if n or kind == PASSES} | {"from": self._from}

    def before(self, name: str) -> Any:
        """A fact of the run that is resumed, by its name; None without such a run."""
        return next((header["facts"].get(name) for header in self._headers), None)

    def expect(self, facts: Mapping[str, Any]) -> None:
        """Adds to the facts that the run depends on, by name, as plain JSON values.

        Raises:
            UserError: the run that is resumed depended on other facts; the message names them.
        """
        self._facts |= facts
        for then in (header["facts"] for header in self._headers):
            if different := _differences(facts, then):
                raise UserError(f"{self.directory}: cannot be resumed: {'; '.join(different)}")

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Begins the journal with the last facts that the run depends on, and each further window with its own facts.

        Raises:
            UserError: see `expect`; the file system refuses; another process is writing.
        """
        if self.begun:
            self._window += 1
            then = self.get(WINDOW, 0)
            if then is None:
                self._append(WINDOW, self._window << 32, json.dumps(facts).encode())
            elif json.loads(then) != facts:
                raise UserError(f"{self.directory}: cannot be resumed: window {self._window + 1} is planned otherwise")
            return
        self.expect(facts)
        self.begun = True
        if self._size:  # this rank goes on with its own file
            return
        if self._from is None:
            _discard(self.directory, self._ranks, self.path)
            self._ranks.barrier()
        with writing(self.path):
            self._occupy()
            os.ftruncate(self._file, 0)
            self._write(_MAGIC)
        began = self._from or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        header = {"facts": self._facts, "began": began, "replaces": self.replaces}
        self._append("header", 0, json.dumps(header).encode())

    def get(self, kind: str, index: int) -> bytes | None:
        """The payload of a record of the resumed run, in the window that was begun last; None without that record."""
        return self._kept.get((kind, self._window << 32 | index))

    def add(self, kind: str, index: int, payload: bytes) -> None:
        """Appends a record. Once `add` returns, the record survives the process; some seconds later, the machine too.

        Raises:
            UserError: the file system refuses; the journal ends with the record before.
        """
        self._added += 1  # before: a signal may come as soon as the record is on disk
        try:
            self._append(kind, self._window << 32 | index, payload)
        except UserError:
            self._added -= 1
            raise

    def close(self) -> None:
        """Closes the file; a journal without records is removed."""
        kept = self._owned or self._added or (self._earlier and not self.begun)
        self._end([] if kept else [self.path])

    def remove(self) -> None:
        """Removes the run's journals, as the last act of the run, and directories made for them that are empty."""
        self._end([self.path, *self._found])

    def _end(self, unwanted: list[Path]) -> None:
        if self._file == _CLOSED:
            return
        with contextlib.suppress(OSError):
            if not unwanted:
                os.fsync(self._file)
        for path in unwanted:
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(self._file)
        self._file = _CLOSED
        with contextlib.suppress(OSError):
            for directory in self._made:  # refused where a file is left
                directory.rmdir()

    def _open_to_resume(self) -> None:
        """Reads all journals here, learns the records other ranks read, then opens this rank's file to write on."""
        with writing(self.path):
            self._found = _named(self.directory)  # an empty one may be another process's
            loaded = {path: _load(path) for path in self._found}
            self._headers = [json.loads(records[0][2]) for records in loaded.values() if records]
            if not self._ranks.any(bool(self._headers)):
                if self._found:
                    raise UserError(f"{self._found[0]}: damaged, cannot be resumed; --overwrite starts anew")
                raise UserError(f"{self.directory}: no interrupted run to resume")
            self.replaces |= any(header.get("replaces", True) for header in self._headers)
            first = min((header["began"] for header in self._headers), default="")
            self._from = min(began for began in self._ranks.gather(first) if began)
            self._kept = {(k, i): payload for some in loaded.values() for k, i, payload, _ in some[1:]}
            if len(set(self._ranks.gather(_digest_of(self._kept) if self._ranks.size > 1 else ""))) > 1:
                self._kept = self._ranks.collect(self._kept)
            if own := loaded.get(self.path):
                self._owned, self._size = len(own) - 1, own[-1][3]
                self._file = _opened(self.path, os.O_RDWR, fcntl.LOCK_EX)
                self._cut()

    def _occupy(self) -> None:
        """Opens this rank's file and the lock on it, and makes the directory; does nothing where the file is open."""
        if self._file != _CLOSED:
            return
        with writing(self.path):
            self._made = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = _opened(self.path, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
            self._earlier = os.fstat(self._file).st_size > 0

    def _append(self, kind: str, index: int, payload: bytes) -> None:
        head = _KINDS.index(kind) | index >> 32 << 8, index & 0xFFFFFFFF
        with writing(self.path):
            self._write(_HEAD.pack(*head, len(payload), _digest(*head, self._size, payload)) + payload)
            if time.monotonic() - self._synced > SYNC:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def _write(self, data: bytes) -> None:
        """Writes all of `data` or, where the file system refuses, nothing."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            self._cut()
            raise
        self._size += len(data)

    def _cut(self) -> None:
        """Cuts off the file after the last whole record, where writing goes on."""
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)


def _differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """The facts that differ, in words."""
    changed = [name for name in now if now[name] != then.get(name)]
    return [f"{name} is {_shown(now[name])}, was {_shown(then.get(name))}" for name in changed]


def _discard(directory: Path, ranks: Ranks, kept: Path | None) -> None:
    """Removes an earlier run's journals, one rank per machine, but for `kept`, which this rank has open and empties."""
    for path in journals_in(directory) if ranks.local_rank == 0 else ():
        if path == kept:
            continue
        with writing(path):
            try:
                file = _opened(path, os.O_RDONLY, fcntl.LOCK_EX)
            except UserError:
                if path.name == NAME and ranks.rank:  # rank 0 has it open
                    continue
                raise
            path.unlink()
            os.close(file)


def _opened(path: Path, flags: int, lock: int) -> int:
    """Opens a file that no other process writes, not through a link; LOCK_EX makes it this process's alone."""
    for _ in range(ATTEMPTS):
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, lock | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{path.parent}: another process is writing results here") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.lstat()):
                return file
        os.close(file)  # another process removed the file before it was locked
    raise UserError(f"{path}: other processes remove this file again and again; end them, or choose another --output")


def read(content: bytes) -> Iterator[Record]:
    """The records of a journal, up to the first that is not whole."""
    if not content.startswith(_MAGIC):
        return
    at = len(_MAGIC)
    while at + _HEAD.size <= len(content):
        kind, index, length, digest = _HEAD.unpack_from(content, at)
        begin = at + _HEAD.size
        payload = content[begin : begin + length]
        if kind & 255 >= len(_KINDS) or len(payload) < length or digest != _digest(kind, index, at, payload):
            return
        at = begin + length
        yield _KINDS[kind & 255], kind >> 8 << 32 | index, payload, at


def _load(path: Path) -> list[Record]:
    """A journal's records, beginning with its header; none where the header is damaged."""
    with open(_opened(path, os.O_RDONLY, fcntl.LOCK_SH), "rb") as file:
        records = list(read(file.read()))
    try:
        header = json.loads(records[0][2]) if records and records[0][0] == "header" else None
    except (ValueError, RecursionError):
        return []
    whole = isinstance(header, dict) and isinstance(header.get("facts"), dict) and isinstance(header.get("began"), str)
    return records if whole else []


def _has_records(path: Path) -> bool:
    """Whether a journal holds more than its header."""
    try:
        return len(list(islice(read(path.read_bytes()), 2))) > 1
    except OSError:
        return False


def _digest_of(kept: Mapping[tuple[str, int], bytes]) -> str:
    sha = hashlib.sha256()
    for (kind, index), payload in sorted(kept.items()):
        sha.update(_digest(_KINDS.index(kind), index, 0, payload))
    return sha.hexdigest()


def _shown(value: Any) -> str:
    """A value as a message shows it; a digest is cut short."""
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _digest(kind: int, index: int, at: int, payload: bytes) -> bytes:
    sha = hashlib.blake2b(struct.pack("<IIQQ", kind, index, len(payload), at), digest_size=16)
    sha.update(payload)
    return sha.digest()
