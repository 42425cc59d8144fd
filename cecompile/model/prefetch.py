"""Reads a checkpoint into the page cache while Python still imports torch and transformers.

The imports take seconds in which the disk is idle. A thread reads the files in the order in which they are loaded, if
memory holds them beside the model. Loading follows, and drops bytes from the page cache once read. When loading has
caught up with the thread, the thread ends. This module does not import torch.
"""

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cecompile import procfs

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PIECE = 32 * 2**20  # bytes read at once
NEAR = 2 * PIECE  # bytes between loading and the thread at which loading has caught up
CACHED = 0.5  # the largest checkpoint to read ahead, as a share of the memory left


class Prefetch(threading.Thread):
    """Reads `files`, sorted by name, into the page cache until all are read or loading has caught up."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(name="prefetch", daemon=True)
        self._files = files
        self._at = ("", 0)  # the name of a file, and a byte in it
        self._caught_up = False

    def run(self) -> None:
        """Reads the files. A file that cannot be read is reported later, by loading."""
        content = bytearray(PIECE)
        for file in self._files:
            with suppress(OSError), open(file, "rb", buffering=0) as opened:
                size = os.fstat(opened.fileno()).st_size
                for start in range(0, size, PIECE):
                    self._at = file.name, start
                    if self._caught_up:
                        return
                    if not _is_cached(opened.fileno(), start):
                        os.preadv(opened.fileno(), [content], start)

    def reached(self, file: Path, start: int) -> None:
        """Tells the thread that loading has come to byte `start` of a file."""
        self._caught_up |= (file.name, start + NEAR) >= self._at


_running: list[Prefetch] = []


def begin(model: str) -> None:
    """Starts to read the checkpoint in a directory or in the hub's cache, if memory holds the checkpoint twice."""
    with suppress(Exception):  # faults of a damaged checkpoint are reported later, by loading
        files = _files(model)
        if 0 < sum(file.stat().st_size for file in files) <= CACHED * procfs.memory_left():
            _running.append(Prefetch(files))
            _running[-1].start()


def reached(file: Path, start: int) -> None:
    """Tells all threads that loading has come to byte `start` of a file."""
    for one in _running:
        one.reached(file, start)


def _files(model: str) -> list[Path]:
    """The checkpoint's files on this machine."""
    single, index = _find(model, SINGLE), _find(model, INDEX)
    if single is not None or index is None:
        return [] if single is None else [single]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for name in names if Path(name).name == name and (file := _find(model, name)) is not None]


def _find(model: str, name: str) -> Path | None:
    if Path(model).is_dir():
        return file if (file := Path(model) / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name)
    return Path(found) if isinstance(found, str) else None


def _is_cached(descriptor: int, start: int) -> bool:
    """Whether a byte of a file is in the page cache; False where the system does not say."""
    with suppress(OSError, AttributeError):
        return os.preadv(descriptor, [bytearray(1)], start, os.RWF_NOWAIT) == 1
    return False
