"""The layers of a checkpoint, one after another and around again, in two places on the device: read while others run.

While a layer computes, threads read the next one's tensors from the safetensors files: on the CPU straight to where
they are used, for a CUDA device into a few pinned buffers, from which a stream per place copies them. A place is
written once all that was queued with what it held is done.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from cecompile.device import is_integrated
from cecompile.errors import CheckError, UserError
from cecompile.model.layer_layout import PLACES, Layout, layer_layout
from cecompile.model.load import Loaded
from cecompile.model.prefetch import CACHED
from cecompile.model.safetensors_reader import StoredTensor
from cecompile.model.structure import decoder_layers
from cecompile.procfs import memory_left

BLOCK = 8 * 2**20  # bytes read at once, and as many of what they become in another dtype
BUFFERS = 2  # of BLOCK bytes per thread: one is read into while the other is copied from
READERS = {"cuda": min(8, os.cpu_count() or 1), "cpu": 1}  # on the CPU the layers compute on all cores meanwhile


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is read at once: `size` bytes from `start` of a file, of `dtype`, to `at` in the place."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    at: int


class Files:
    """A checkpoint's files, open, and as they were when they were opened.

    Args:
        model: named in errors.
        paths: of the files.

    Raises:
        UserError: one cannot be opened.
    """

    def __init__(self, model: str, paths: Sequence[Path]) -> None:
        self._model = model
        self._stack = ExitStack()
        self.descriptors: dict[Path, int] = {}
        try:
            for path in paths:
                self.descriptors[path] = os.open(path, os.O_RDONLY)
                self._stack.callback(os.close, self.descriptors[path])
        except OSError as error:
            self._stack.close()
            raise UserError(f"{model}: weights: {path.name}: {error.strerror}") from None
        self._before = {path: _state(os.fstat(d)) for path, d in self.descriptors.items()}
        self.size = sum(size for size, *_ in self._before.values())

    def __del__(self) -> None:
        self._stack.close()

    def check_unchanged(self) -> None:
        """Raises CheckError if a file is another, was written to, or is gone since it was opened."""
        for path, descriptor in self.descriptors.items():
            states = [_state(os.fstat(descriptor))]
            with suppress(OSError):
                states.append(_state(os.stat(path)))
            if states != 2 * [self._before[path]]:
                raise CheckError(f"{self._model}: weights: {path.name} changed during the run; nothing was written")


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def worth_keeping(size: int, device: torch.device) -> bool:
    """Whether files of `size` bytes are to stay in the page cache between sweeps.

    Not where they would drive one another out of it, nor where the device's memory is the host's.
    """
    if is_integrated(device):
        return False
    return size <= CACHED * memory_left()


class LayerFeed:
    """Brings the layers to the device, round after round.

    Use: `rewind`, then for each layer in order `take`, queue what uses it, `give_back`; after the last the first comes
    again. What comes next is being read all the while.

    Args:
        name: the model's, for errors.
        loaded: with none of its layers loaded.
        files: those of the checkpoint, opened before it was loaded.
        device: where to.

    Attributes:
        layout: of every layer.
        places: two tensors of (layout.size,) uint8 on the device.
        layers: how many there are.
        layer_bytes: read per layer, from the files.
        read_seconds: in which something was being read, so far.
        waited: seconds that the CPU stood still in `take`; a CUDA device waits by itself.

    Raises:
        UserError: this model's layers cannot be streamed.
    """

    def __init__(self, name: str, loaded: Loaded, files: Files, device: torch.device) -> None:
        self.layout = layer_layout(loaded.model)
        self._name, self._files, self._device = name, files, device
        self._pieces = _pieces(loaded, self.layout)
        self.layers = len(self._pieces)
        self.layer_bytes = sum(piece.size for piece in self._pieces[0])
        self.places = [torch.zeros(self.layout.size, dtype=torch.uint8, device=device) for _ in range(PLACES)]
        self.read_seconds = self.waited = 0.0
        self._keeps = worth_keeping(files.size, device)
        self._lock, self._reading, self._since = threading.Lock(), 0, 0.0
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(READERS[device.type], "feed")
        self._cuda = [_CudaSide(device) for _ in range(PLACES)] if device.type == "cuda" else None
        self._coming: list[tuple[int, list[Future[None]]]] = []  # layers, the next first, and what reads them
        self._taken = 0  # layers, since the first
        self._turn = 0  # the place where the next one is to be read to

    def rewind(self) -> None:
        """Makes the first layer the next, and begins to read it and the one after it."""
        if self._coming and self._coming[0][0] != 0:
            self.settle()
            self._coming.clear()
        if not self._coming:
            self._taken = self._turn = 0
            for side in self._cuda or ():
                side.left.record(torch.cuda.current_stream(self._device))
            for _ in range(PLACES):
                self._read_next()

    def take(self) -> int:
        """Waits for the next layer; the place in which it is, for what is queued from now on.

        Raises:
            UserError: it cannot be read.
        """
        began = perf_counter()
        _, reads = self._coming[0]
        for one in reads:
            one.result()
        self.waited += perf_counter() - began
        place = self._taken % PLACES
        if self._cuda is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._cuda[place].stream)
        return place

    def give_back(self) -> None:
        """All that uses the layer taken last is queued: its place is free after that."""
        self._coming.pop(0)
        if self._cuda is not None:
            self._cuda[self._taken % PLACES].left.record(torch.cuda.current_stream(self._device))
        self._taken += 1
        self._read_next()

    def settle(self) -> None:
        """Waits until nothing is being read or copied."""
        for _, reads in self._coming:
            for one in reads:
                with suppress(UserError):
                    one.result()
        for side in self._cuda or ():
            side.stream.synchronize()

    def _read_next(self) -> None:
        layer = (self._coming[-1][0] + 1) % self.layers if self._coming else self._taken % self.layers
        place, self._turn = self._turn, (self._turn + 1) % PLACES
        if self._cuda is not None:
            self._cuda[place].stream.wait_event(self._cuda[place].left)
        self._coming.append((layer, [self._threads.submit(self._read, piece, place) for piece in self._pieces[layer]]))

    def _read(self, piece: _Piece, place: int) -> None:
        values = piece.size // piece.dtype.itemsize
        target = self.places[place][piece.at : piece.at + values * self.layout.dtype.itemsize]
        if self._cuda is None:
            self._fill(piece, target)
            return
        if not hasattr(self._own, "buffers"):
            self._own.buffers, self._own.turn = [_Pinned() for _ in range(BUFFERS)], 0
        self._own.turn = (self._own.turn + 1) % BUFFERS
        pinned: _Pinned = self._own.buffers[self._own.turn]
        pinned.copied.synchronize()
        part = pinned.content[: len(target)]
        self._fill(piece, part)
        stream = self._cuda[place].stream
        with torch.cuda.stream(stream):
            target.copy_(part, non_blocking=True)
            pinned.copied.record(stream)

    def _fill(self, piece: _Piece, target: Tensor) -> None:
        """Reads a piece into host memory, (bytes,) uint8; where it is of another dtype by way of a buffer."""
        with self._lock:
            self._since = perf_counter() if self._reading == 0 else self._since
            self._reading += 1
        try:
            if piece.dtype == self.layout.dtype:
                self._read_file(piece, target)
            else:
                if not hasattr(self._own, "stored"):
                    self._own.stored = torch.empty(BLOCK, dtype=torch.uint8)
                stored = self._own.stored[: piece.size]
                self._read_file(piece, stored)
                target.view(self.layout.dtype).copy_(stored.view(piece.dtype))
        finally:
            with self._lock:
                self._reading -= 1
                if self._reading == 0:
                    self.read_seconds += perf_counter() - self._since

    def _read_file(self, piece: _Piece, into: Tensor) -> None:
        content, done, descriptor = into.numpy(), 0, self._files.descriptors[piece.file]
        try:
            while done < piece.size:
                count = os.preadv(descriptor, [content[done:].data], piece.start + done)
                if count == 0:
                    raise UserError(f"{self._name}: weights: {piece.file.name}: became shorter while it was read")
                done += count
            if not self._keeps:
                os.posix_fadvise(descriptor, piece.start, piece.size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise UserError(f"{self._name}: weights: {piece.file.name}: {error.strerror}") from None


class _CudaSide:
    """What a place is copied to on, and when all that uses what it holds is done."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.left = torch.cuda.Stream(device), torch.cuda.Event()


class _Pinned:
    """A host buffer of BLOCK bytes, and when what was in it is copied."""

    def __init__(self) -> None:
        self.content = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()


def _pieces(loaded: Loaded, layout: Layout) -> list[list[_Piece]]:
    """What is read of each layer, in the order of the files."""
    names = {module: name for name, module in loaded.model.named_modules()}
    out = []
    for layer in decoder_layers(loaded.model):
        pieces: list[_Piece] = []
        for name in layout.shapes:
            source = loaded.left.get(f"{names[layer]}.{name}")
            if source is None:
                raise UserError(
                    f"{loaded.model.name_or_path}: {names[layer]}.{name} is not a layer's own: not streamed"
                )
            pieces += _cut(loaded.checkpoint.tensors[source[0]], layout, layout.starts[name])
        out.append(sorted(pieces, key=lambda piece: (piece.file, piece.start)))
    return out


def _cut(tensor: StoredTensor, layout: Layout, at: int) -> list[_Piece]:
    """A tensor in pieces of at most BLOCK bytes, before and after conversion; `at` is where it goes."""
    stored, held = tensor.dtype.itemsize, layout.dtype.itemsize
    most, values = BLOCK // max(stored, held), tensor.size // stored
    return [
        _Piece(tensor.file, tensor.start + i * stored, min(most, values - i) * stored, tensor.dtype, at + i * held)
        for i in range(0, values, most)
    ]
