"""The layers of a checkpoint, one after another and around again, in two places on the device.

While a layer computes, threads read the next layer's tensors from the safetensors files: on the CPU straight into
the layer's place, for a CUDA device into a few pinned buffers, from which a stream per place copies. A place is
overwritten once all work that uses its last layer is done.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from cecompile import device as device_memory
from cecompile import procfs
from cecompile.errors import CheckError, UserError, file_errors
from cecompile.model.layer_layout import PLACES, Layout, layer_layout
from cecompile.model.load import Loaded
from cecompile.model.prefetch import CACHED
from cecompile.model.safetensors_reader import StoredTensor, read_into
from cecompile.model.structure import decoder_layers

BLOCK = 8 * 2**20  # most bytes read at once, as stored and as converted
BUFFERS = 2  # pinned, per thread: one is filled while the other is copied from
READERS = {"cuda": min(8, os.cpu_count() or 1), "cpu": 1}  # on the CPU all cores compute layers


@dataclass(frozen=True, slots=True)
class _Piece:
    """One read: `size` bytes of `dtype` from `start` of a file, to byte `at` of the place."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    at: int


class Files:
    """A checkpoint's open files, and the files' state when opened; `model` is a name for errors.

    Raises:
        UserError: a file cannot be opened.
    """

    def __init__(self, model: str, paths: Sequence[Path]) -> None:
        self._model = model
        self.descriptors: dict[Path, int] = {}
        for path in paths:
            with file_errors(f"{model}: weights: {path.name}"):
                self.descriptors[path] = os.open(path, os.O_RDONLY)
        self._before = {path: _state(os.fstat(d)) for path, d in self.descriptors.items()}
        self.size = sum(size for size, *_ in self._before.values())

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def check_unchanged(self) -> None:
        """Raises CheckError if a file was written to, replaced or removed since it was opened."""
        for path, descriptor in self.descriptors.items():
            states = [_state(os.fstat(descriptor))]
            with suppress(OSError):
                states.append(_state(os.stat(path)))
            if states != 2 * [self._before[path]]:
                raise CheckError(f"{self._model}: weights: {path.name} changed during the run; nothing was written")


def _state(found: os.stat_result) -> tuple[int, ...]:
    """Facts of a file that change when the file does; the time of modification alone may be set back."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def worth_keeping(size: int, device: torch.device) -> bool:
    """Whether to keep files of `size` bytes in the page cache: all fit in memory, and the device has its own memory."""
    return not device_memory.is_integrated(device) and size <= CACHED * procfs.memory_left()


class LayerFeed:
    """Brings the layers to the device, round after round.

    Call `rewind`; then for each layer in order `take`, queue all work that uses the layer, and `give_back`. After the
    last layer the first comes again. Meanwhile the next layers are read.

    Args:
        name: the model's, for errors.
        loaded: the model, without its layers' weights.
        files: of the checkpoint, opened before `loaded` was.

    Attributes:
        layout: of every layer.
        places: two tensors of (layout.size,) uint8 on the device.
        layers, layer_bytes: the number of layers, and the bytes read from the files per layer.
        read_seconds: during which something was being read, so far.
        waited: seconds that the host waited in `take`; a CUDA device waits by itself.

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
        # per place, the stream that copies into it, and the event after all uses of its last layer
        places = range(PLACES if device.type == "cuda" else 0)
        self._cuda = [(torch.cuda.Stream(device), torch.cuda.Event()) for _ in places]
        self._coming: list[list[Future[None]]] = []  # the reads of each layer to come, the next layer first
        self._taken = self._begun = 0  # layers since the last start at the first: given back, and begun to be read

    def rewind(self) -> None:
        """Makes the first layer the next, and begins to read the first two layers."""
        if self._taken % self.layers:
            self.settle()
            self._coming.clear()
        if not self._coming:
            self._taken = self._begun = 0
            for _, left in self._cuda:
                left.record(torch.cuda.current_stream(self._device))
            for _ in range(PLACES):
                self._read_next()

    def take(self) -> int:
        """Waits for the next layer; returns its place, for use by all work queued from now on.

        Raises:
            UserError: the layer cannot be read.
        """
        began = perf_counter()
        for read in self._coming[0]:
            read.result()
        self.waited += perf_counter() - began
        place = self._taken % PLACES
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._cuda[place][0])
        return place

    def give_back(self) -> None:
        """Frees the place of the layer taken last, once all work queued by now is done."""
        self._coming.pop(0)
        if self._cuda:
            self._cuda[self._taken % PLACES][1].record(torch.cuda.current_stream(self._device))
        self._taken += 1
        self._read_next()

    def settle(self) -> None:
        """Waits until nothing is being read or copied."""
        for read in chain(*self._coming):
            with suppress(UserError):
                read.result()
        for stream, _ in self._cuda:
            stream.synchronize()

    def _read_next(self) -> None:
        pieces, place = self._pieces[self._begun % self.layers], self._begun % PLACES
        self._begun += 1
        if self._cuda:
            stream, left = self._cuda[place]
            stream.wait_event(left)
        self._coming.append([self._threads.submit(self._read, piece, place) for piece in pieces])

    def _read(self, piece: _Piece, place: int) -> None:
        values = piece.size // piece.dtype.itemsize
        target = self.places[place][piece.at : piece.at + values * self.layout.dtype.itemsize]
        if not self._cuda:
            self._fill(piece, target)
            return
        if not hasattr(self._own, "buffers"):  # each with the event after its last copy to the device
            pinned = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
            self._own.buffers = cycle([(content, torch.cuda.Event()) for content in pinned])
        content, copied = next(self._own.buffers)
        copied.synchronize()
        part = content[: len(target)]
        self._fill(piece, part)
        stream, _ = self._cuda[place]
        with torch.cuda.stream(stream):
            target.copy_(part, non_blocking=True)
            copied.record(stream)

    def _fill(self, piece: _Piece, target: Tensor) -> None:
        """Reads a piece into host memory, (bytes,) uint8; a piece of another dtype is converted by way of a buffer."""
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
        descriptor = self._files.descriptors[piece.file]
        read_into(into, f"{self._name}: weights: {piece.file.name}", descriptor, piece.start)
        if not self._keeps:
            os.posix_fadvise(descriptor, piece.start, piece.size, os.POSIX_FADV_DONTNEED)


def _pieces(loaded: Loaded, layout: Layout) -> list[list[_Piece]]:
    """The reads for each layer, in the order of the files."""
    names = {module: name for name, module in loaded.model.named_modules()}
    out = []
    for layer in decoder_layers(loaded.model):
        pieces: list[_Piece] = []
        for name, at in layout.starts.items():
            source = loaded.left.get(f"{names[layer]}.{name}")
            if source is None:
                raise UserError(f"{loaded.model.name_or_path}: {names[layer]}.{name} is shared: cannot be streamed")
            pieces += _cut(loaded.checkpoint.tensors[source[0]], layout, at)
        out.append(sorted(pieces, key=lambda piece: (piece.file, piece.start)))
    return out


def _cut(tensor: StoredTensor, layout: Layout, at: int) -> list[_Piece]:
    """A tensor as pieces of at most BLOCK bytes, before and after conversion; `at` is its start in the place."""
    stored, held = tensor.dtype.itemsize, layout.dtype.itemsize
    most, values = BLOCK // max(stored, held), tensor.size // stored
    return [
        _Piece(tensor.file, tensor.start + i * stored, min(most, values - i) * stored, tensor.dtype, at + i * held)
        for i in range(0, values, most)
    ]
