"""The journal of a run: what is finished, appended as it is, so that an interrupted run can go on from there.

    MAGIC
    record 0     the header, JSON: what the run depends on, and when it began
    record 1...  a finished part of the run each: its kind, its index, its bytes

A run in windows counts the indices of each window anew; `begin` begins the next one. Every window but the first has a
record of its own of what it depends on.

A record is a head (kind, index, length of the payload, digest over those three, the record's place and the payload)
and the payload. Records are only ever appended, by one process at a time, so that a process may be killed at any
moment: what is read back ends at the first record that is cut off or damaged, and goes on from there.

Where several ranks share a run, each has a journal of its own; any number of ranks goes on with all that are there.

This module knows neither what is journaled nor why.
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
from pathlib import Path
from typing import Any

from cecompile.errors import UserError
from cecompile.ranks import ALONE, Ranks

NAME = ".journal.partial"  # of rank 0; rank 1 has .journal-1.partial
PASSES, ANSWERS, WINDOW = "passes", "answers", "window"  # the kinds of records
SYNC = 5.0  # seconds between two waits for the disk, at least

_MAGIC = b"cecompile journal 1\n"
_KINDS = ("header", PASSES, ANSWERS, WINDOW)
_NAMES = re.compile(r"\.journal(-[1-9][0-9]*)?\.partial")
_HEAD = struct.Struct("<IIQ16s")  # kind and, from bit 8 on, window; index; payload's length; digest


def journals_in(directory: Path) -> list[Path]:
    """The journals of all ranks there; none where there is no such directory."""
    try:
        return sorted(path for path in directory.iterdir() if _NAMES.fullmatch(path.name))
    except OSError:
        return []


class Journal:
    """A result directory's journal, as one rank writes it and all ranks read it.

    Args:
        directory: where; made when the journal begins.
        resume: go on with the journals that are there; otherwise those that are there are replaced when this one
            begins.
        ranks: that write their journals at the same time; all make, begin and end theirs together.

    Raises:
        UserError: there is none to resume, it is damaged from its beginning on, or another process is writing it.
    """

    def __init__(self, directory: Path, resume: bool = False, ranks: Ranks = ALONE) -> None:
        self.directory = directory
        self.path = directory / (f".journal-{ranks.rank}.partial" if ranks.rank else NAME)
        self._ranks = ranks
        self._file: int | None = None
        self._made: list[Path] = []  # directories, innermost first
        self._facts: dict[str, Any] = {}
        self._then: list[dict[str, Any]] = []  # the headers of what is resumed
        self._from: str | None = None  # when that began
        self._found: list[Path] = []  # where it is
        self._kept: dict[tuple[str, int], bytes] = {}  # by all ranks
        self._size = 0
        self._synced = time.monotonic()
        self._owned = 0  # records that were in this rank's file already
        self._added = 0
        self._begun = False
        self._window = 0
        if resume:
            self._open_to_resume()
        elif ranks.restarts:
            self._discard()  # a rank that is started again could not tell them from this run's

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def resumable(self) -> bool:
        """Whether there is something on disk that a later run can go on with."""
        if (self._owned or self._added) and self.path.exists():
            return True
        others = journals_in(self.directory) if self._begun or self._from else []
        return any(_has_records(path) for path in others if path != self.path)

    @property
    def begun(self) -> bool:
        """Whether what the run depends on was complete, and the same where it was resumed."""
        return self._begun

    @property
    def resumed(self) -> dict[str, Any] | None:
        """How much was taken over, by kind, and when the run began that it is from; None if nothing was."""
        if self._from is None or not self._kept:
            return None
        counts = {kind: sum(k == kind for k, _ in self._kept) for kind in (PASSES, ANSWERS)}
        return {kind: n for kind, n in counts.items() if n or kind == PASSES} | {"from": self._from}

    def expect(self, facts: Mapping[str, Any]) -> None:
        """Adds to what the run depends on, by name, as plain JSON values.

        Raises:
            UserError: the run that is resumed depended on something else; says on what.
        """
        self._facts |= facts
        for then in (header["facts"] for header in self._then):
            different = [
                f"{name} is {_shown(now)}, was {_shown(then.get(name))}"
                for name, now in facts.items()
                if now != then.get(name)
            ]
            if different:
                raise UserError(f"{self.directory}: cannot be resumed: {'; '.join(different)}")

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Ready for records, with the last of what the run depends on; then, for each further window, with its own.

        Raises:
            UserError: see `expect`; the file system refuses; another process is writing.
        """
        if self._begun:
            self._begin_window(facts)
            return
        self.expect(facts)
        self._begun = True
        if self._file is not None:
            return
        try:
            if self._from is None:
                self._discard()
                self._ranks.barrier()
            missing = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            self._made = missing
            self._lock(os.O_CREAT)
            assert self._file is not None
            os.ftruncate(self._file, 0)
            self._write(_MAGIC)
        except OSError as error:
            raise self._refusal(error) from None
        began = self._from or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        header = {"facts": self._facts, "began": began}
        self._append("header", 0, json.dumps(header).encode())

    def get(self, kind: str, index: int) -> bytes | None:
        """A record of the run that is resumed, in the window that was begun last, or None."""
        return self._kept.get((kind, self._window << 32 | index))

    def add(self, kind: str, index: int, payload: bytes) -> None:
        """Appends a record. Once this returns, it survives the process; the machine, some seconds later.

        Raises:
            UserError: the file system refuses; the journal ends with the record before.
        """
        self._append(kind, self._window << 32 | index, payload)
        self._added += 1

    def close(self) -> None:
        """Ends it; what is of no use to a later run is removed."""
        if self._file is None:
            return
        if not (self._owned or self._added):
            self._remove([self.path])
            return
        with contextlib.suppress(OSError):
            os.fsync(self._file)
        os.close(self._file)
        self._file = None

    def remove(self) -> None:
        """Removes all that the run has left, as the last thing it does, and directories made for it that are empty."""
        if self._file is not None:
            self._remove([self.path, *self._found])

    def _remove(self, paths: list[Path]) -> None:
        assert self._file is not None
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(self._file)
        self._file = None
        with contextlib.suppress(OSError):
            for directory in self._made:
                directory.rmdir()

    def _begin_window(self, facts: Mapping[str, Any]) -> None:
        self._window += 1
        then = self.get(WINDOW, 0)
        if then is None:
            self._append(WINDOW, self._window << 32, json.dumps(facts).encode())
        elif json.loads(then) != facts:
            raise UserError(f"{self.directory}: cannot be resumed: window {self._window + 1} is planned otherwise")

    def _open_to_resume(self) -> None:
        """Reads all journals here, and learns what other ranks have read elsewhere; only then is one written on."""
        try:
            self._found = journals_in(self.directory)
            damaged = [path for path in self._found if not self._read(path)]
            if not self._ranks.any(bool(self._then)):
                if damaged:
                    raise UserError(f"{damaged[0]}: damaged, cannot be resumed; --overwrite starts anew")
                raise UserError(f"{self.directory}: no interrupted run to resume")
            self._from = min(b for b in self._ranks.gather(min((h["began"] for h in self._then), default="")) if b)
            if len(set(self._ranks.gather(_digest_of(self._kept) if self._ranks.size > 1 else ""))) > 1:
                self._kept = self._ranks.collect(self._kept)
            if self._size:
                self._lock(0)
                assert self._file is not None
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
        except OSError as error:
            raise self._refusal(error) from None

    def _read(self, path: Path) -> bool:
        """Takes over a journal's records; False where it has not even a header."""
        file = self._opened(path, os.O_RDONLY, fcntl.LOCK_SH)
        with open(file, "rb") as opened:
            records = read(opened.read())
        first = next(records, None)
        header = None if first is None else _header(first)
        if first is None or header is None:
            return False
        self._then.append(header)
        size, count = first[3], 0
        for kind, index, payload, end in records:
            self._kept[kind, index] = payload
            size, count = end, count + 1
        if path == self.path:
            self._size, self._owned = size, count
        return True

    def _discard(self) -> None:
        """Removes an earlier run's journals, but for the file that becomes this rank's; one rank per machine does."""
        try:
            for path in journals_in(self.directory) if self._ranks.local_rank == 0 else ():
                if path != self.path or self._ranks.restarts:
                    file = self._opened(path, os.O_RDONLY, fcntl.LOCK_EX)
                    path.unlink()
                    os.close(file)
        except OSError as error:
            raise self._refusal(error) from None

    def _lock(self, flags: int) -> None:
        self._file = self._opened(self.path, os.O_RDWR | flags, fcntl.LOCK_EX)

    def _opened(self, path: Path, flags: int, lock: int) -> int:
        """A file, not through a link, which no other process writes; with LOCK_EX it is this process's alone."""
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, lock | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{self.directory}: another process is writing results here") from None
        return file

    def _append(self, kind: str, index: int, payload: bytes) -> None:
        head = _KINDS.index(kind) | index >> 32 << 8, index & 0xFFFFFFFF
        digest = _digest(*head, self._size, payload)
        try:
            self._write(_HEAD.pack(*head, len(payload), digest) + payload)
            if time.monotonic() - self._synced > SYNC:
                assert self._file is not None
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise self._refusal(error) from None

    def _write(self, data: bytes) -> None:
        """All of `data` or, where the file system refuses, nothing."""
        assert self._file is not None
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(data)

    def _refusal(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written: {error.strerror}")


def read(content: bytes) -> Iterator[tuple[str, int, bytes, int]]:
    """The records of a journal, up to the first that is not whole: kind, index, payload, and where the record ends.

    The index has its window from bit 32 on.
    """
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


def _has_records(path: Path) -> bool:
    """Whether a journal holds more than its header."""
    try:
        records = read(path.read_bytes())
    except OSError:
        return False
    return next(records, None) is not None and next(records, None) is not None


def _digest_of(kept: Mapping[tuple[str, int], bytes]) -> str:
    sha = hashlib.sha256()
    for (kind, index), payload in sorted(kept.items()):
        sha.update(_digest(_KINDS.index(kind), index, 0, payload))
    return sha.hexdigest()


def _shown(value: Any) -> str:
    """A value in a message; of a digest its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _digest(kind: int, index: int, at: int, payload: bytes) -> bytes:
    sha = hashlib.blake2b(struct.pack("<IIQQ", kind, index, len(payload), at), digest_size=16)
    sha.update(payload)
    return sha.digest()


def _header(record: tuple[str, int, bytes, int]) -> dict[str, Any] | None:
    """The first record's content; None if it is not a header."""
    try:
        header = json.loads(record[2]) if record[0] == "header" else None
    except (ValueError, RecursionError):
        return None
    whole = isinstance(header, dict) and isinstance(header.get("facts"), dict) and isinstance(header.get("began"), str)
    return header if whole else None
