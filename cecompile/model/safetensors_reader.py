"""Reads safetensors files once, front to back, through a few host buffers, and digests every tensor on the way.

A mapped checkpoint would stay in the page cache beside the model, which takes twice the memory where device and host
share one. So blocks are read with `pread` into reused buffers, copied out, and dropped from the page cache. Two threads
read ahead, some hash, and the caller's thread copies.
"""

import hashlib
import itertools
import json
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cecompile.errors import UserError, file_errors, first_line
from cecompile.model import prefetch
from cecompile.model.digest import chunk_bytes, chunk_digests, combined

BLOCK = 8 * 2**20  # bytes of a read
BLOCKS = 32  # buffers
IN_USE = 24  # buffers that may be copied and hashed at once; the others are read ahead
READERS = 2  # so that a disk has its next request before the last one is done
HASHERS = min(8, os.cpu_count() or 1)

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


class GivenUp(Exception):  # noqa: N818  (nobody is told)
    """Reading was cancelled; the caller no longer needs the tensors."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int  # first byte, counted from the file's beginning
    size: int  # bytes
    aligned: bool  # whether `start` is a multiple of the element's size, counted from the first tensor's first byte


def read_header(model: str, file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in file order and without gaps. Errors name `model`.

    Raises UserError: the file cannot be read, is cut off, has a damaged header, or has a dtype that torch lacks.
    """
    try:
        with safe_open(file, framework="pt"):  # maps the file, reads and checks the header, and no more
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{model}: weights: {file.name}: {first_line(error)}") from None
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        dtype = getattr(torch, _DTYPES.get(kind, ""), None)
        if dtype is None:
            raise UserError(f"{model}: weights: {file.name}: {name} is of dtype {kind}, which is not supported")
        aligned = begin % dtype.itemsize == 0
        tensors.append(StoredTensor(name, dtype, shape, file, 8 + length + begin, end - begin, aligned))
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.size))


def digest_of(tensors: Sequence[StoredTensor], digests: Sequence[str]) -> str:
    """SHA-256 (hex) over all tensors' names, dtypes, shapes and `digests` (hex), whatever their order."""
    lines = (f"{t.name} {t.dtype} {t.shape} {digest}" for t, digest in zip(tensors, digests, strict=True))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors in a checkpoint's files, and their digests."""

    tensors: Sequence[StoredTensor]
    digests: Sequence[str]  # (hex) of each tensor, see `digest`; of no bytes for a tensor that was not read
    converted: Mapping[int, str] = field(default_factory=dict)  # by index, the digest (hex) of each converted tensor

    @property
    def fingerprint(self) -> str:
        """See `digest_of`."""
        return digest_of(self.tensors, self.digests)

    def read(self) -> dict[int, tuple[str, str | None]]:
        """By the index of each tensor that was read: its digest before conversion, and after (None without)."""
        nothing = hashlib.sha256().hexdigest()
        return {i: (d, self.converted.get(i)) for i, d in enumerate(self.digests) if d != nothing}

    def with_read(self, parts: Mapping[int, tuple[str, str | None]]) -> "Checkpoint":
        """The checkpoint with the digests in `parts`, as `read` gives them on every rank."""
        digests = [parts[i][0] if i in parts else digest for i, digest in enumerate(self.digests)]
        return Checkpoint(self.tensors, digests, {i: made for i, (_, made) in parts.items() if made is not None})

    def stored_dtypes(self) -> dict[str, int]:
        """The count of stored numbers by the name of their dtype."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.size // tensor.dtype.itemsize
        return dict(sorted(counts.items()))


def stream(
    model: str, tensors: Sequence[StoredTensor], targets: Mapping[int, torch.Tensor], device: torch.device,
    only: Collection[int] | None = None, keep_cached: bool = False, given_up: threading.Event | None = None,
) -> Checkpoint:  # fmt: skip
    """Reads tensors once, fills `targets`, and takes the digest of every tensor, before and after conversion.

    Meanwhile takes BLOCKS * BLOCK bytes of host memory, pinned for a CUDA device.

    Args:
        model: named in errors.
        tensors: all tensors of one file after another, in the order of `read_header`.
        targets: tensors to fill, by index into `tensors`: contiguous, on `device`, of the same shape. Elements are
            converted to a target's dtype as `Tensor.to` does; this needs a stored tensor that is `aligned`.
        only: indices of the tensors to read, including all targets. None reads all.
        keep_cached: leave the files in the page cache, because they will be read again.
        given_up: set once the caller no longer needs the result.

    Raises:
        UserError: a file cannot be read, or has become shorter.
        GivenUp: `given_up` is set.
    """
    blocks = _blocks(tensors, range(len(tensors)) if only is None else only)
    with ExitStack() as stack:
        buffers = stack.enter_context(host_buffers(BLOCKS, BLOCK, device))
        files = dict.fromkeys(block.file for block in blocks)
        opened = {file: _open(model, file, stack, keep_cached) for file in files}
        converted = {i: target for i, target in targets.items() if target.dtype != tensors[i].dtype}
        hashing = _Hashing(stack.enter_context(ThreadPoolExecutor(HASHERS, "hash")))
        reader = stack.enter_context(ThreadPoolExecutor(READERS, "read"))

        def read_ahead(number: int) -> None:
            if number < len(blocks):
                block, buffer = blocks[number], buffers[number % BLOCKS]
                reads.append(reader.submit(_read, model, opened[block.file], block, buffer, keep_cached))

        reads: deque[Future[None]] = deque()
        in_use: deque[list[Callable[[], object]]] = deque()  # for each buffer, calls that wait until it is free
        for number in range(BLOCKS):
            read_ahead(number)
        for number, block in enumerate(blocks):
            if given_up is not None and given_up.is_set():
                raise GivenUp
            reads.popleft().result()
            in_use.append(_use(block, buffers[number % BLOCKS], tensors, targets, hashing, device))
            if len(in_use) > IN_USE:
                for wait in in_use.popleft():
                    wait()
                read_ahead(number - IN_USE + BLOCKS)
        for wait in itertools.chain(*in_use):
            wait()
        digests = [hashing.digest(i) for i in range(len(tensors))]
        return Checkpoint(tensors, digests, {i: hashing.digest(i, converted=True) for i in converted})


@dataclass(slots=True)
class _Block:
    """At most BLOCK bytes of a file, read at once, with pieces of tensors."""

    file: Path
    start: int
    size: int
    pieces: list[tuple[int, int, slice]]  # (tensor, the piece's first byte in the tensor, its bytes in the block)


def _blocks(tensors: Sequence[StoredTensor], only: Collection[int]) -> list[_Block]:
    """Cuts files into blocks. Tensors are cut between chunks, of which a block holds at least one."""
    blocks: list[_Block] = []
    block = _Block(Path(), 0, 0, [])
    for index in sorted(only):
        tensor, done = tensors[index], 0
        while done < tensor.size:
            begin, chunk = tensor.start + done, chunk_bytes(tensor.dtype)
            if (block.file, block.start + block.size) != (tensor.file, begin):
                block = _Block(tensor.file, begin, BLOCK, [])  # full: the next one is of this file
            rest, room = tensor.size - done, BLOCK - block.size
            size = rest if rest <= room else room // chunk * chunk
            if size == 0:
                block = _Block(tensor.file, begin, 0, [])
                blocks.append(block)
                size = min(rest, BLOCK // chunk * chunk)
            block.pieces.append((index, done, slice(block.size, block.size + size)))
            block.size += size
            done += size
    return blocks


@contextmanager
def host_buffers(count: int, size: int, device: torch.device) -> Iterator[list[torch.Tensor]]:
    """`count` buffers, (size,) uint8, pinned for a CUDA device, and given back to the system afterwards.

    The caller must have dropped all references by then. Torch would keep pinned memory for reuse. A device that shares
    its memory with the host has none to spare.
    """
    pinned = device.type == "cuda"
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
    try:
        yield buffers
    finally:
        buffers.clear()
        if pinned and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


def _open(model: str, file: Path, stack: ExitStack, keep_cached: bool) -> int:
    with file_errors(f"{model}: weights: {file.name}"):
        descriptor = os.open(file, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    if not keep_cached:
        stack.callback(os.posix_fadvise, descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor


def _read(model: str, descriptor: int, block: _Block, buffer: torch.Tensor, keep_cached: bool) -> None:
    """Reads a block into a buffer, (BLOCK,) uint8, from its beginning."""
    prefetch.reached(block.file, block.start)
    read_into(buffer[: block.size], f"{model}: weights: {block.file.name}", descriptor, block.start)
    behind = block.start - READERS * BLOCK  # no other thread reads before this byte any more
    if behind > 0 and not keep_cached:
        os.posix_fadvise(descriptor, 0, behind, os.POSIX_FADV_DONTNEED)


def read_into(target: torch.Tensor, where: str, descriptor: int, start: int) -> None:
    """Fills `target`, (bytes,) uint8 on the host, from byte `start` of an open file. Errors begin with `where`.

    Raises UserError: the file cannot be read, or has become shorter.
    """
    content, done = target.numpy(), 0
    with file_errors(where):
        while done < len(content):
            count = os.preadv(descriptor, [content[done:].data], start + done)
            if count == 0:
                raise UserError(f"{where}: became shorter while it was read")
            done += count


def _use(
    block: _Block, buffer: torch.Tensor, tensors: Sequence[StoredTensor], targets: Mapping[int, torch.Tensor],
    hashing: "_Hashing", device: torch.device,
) -> list[Callable[[], object]]:  # fmt: skip
    """Hashes a block's tensors and copies them to their targets. Returns calls that wait until both are done."""
    waits: list[Callable[[], object]] = []
    for i, offset, part in block.pieces:
        waits.append(hashing.add(i, offset, buffer[part], tensors[i].dtype).result)
    for i, offset, part in block.pieces:
        if i in targets:
            written = _copy(buffer[part], tensors[i].dtype, offset, targets[i])
            if written is not None:
                waits.append(hashing.add(i, offset, written, targets[i].dtype, converted=True).result)
    if device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))
        waits.append(copied.synchronize)
    return waits


def _copy(content: torch.Tensor, dtype: torch.dtype, offset: int, target: torch.Tensor) -> torch.Tensor | None:
    """Copies `content`, (bytes,) uint8, to its place in the whole `target`; to a CUDA device asynchronously.

    `content` begins at byte `offset` of a stored tensor of `dtype`. Returns the converted bytes, (bytes,) uint8 on the
    CPU; None where the dtypes are the same.
    """
    flat = target.view(-1)
    if dtype == target.dtype:
        part = flat.view(torch.uint8)[offset : offset + len(content)]
        if part.is_cuda:
            part.copy_(content, non_blocking=True)
        else:  # NumPy copies on this thread alone; torch would take cores from the others
            np.copyto(part.numpy(), content.numpy())
        return None
    values = content.view(dtype)
    first = offset // dtype.itemsize
    part = flat[first : first + len(values)]
    if part.is_cuda:  # converted on the CPU; the converted copy is not pinned
        values = values.to(target.dtype)
        part.copy_(values)
        return values.view(torch.uint8)
    return part.copy_(values).view(torch.uint8)


class _Hashing:
    """Digests of tensors whose pieces come in any order, before and after conversion."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._pieces: dict[tuple[int, bool], dict[int, Future[list[bytes]]]] = {}

    def add(
        self, tensor: int, offset: int, content: torch.Tensor, dtype: torch.dtype, converted: bool = False
    ) -> Future[list[bytes]]:
        """Hashes a piece: whole chunks of a tensor, of which the last may be short.

        Args:
            tensor: the tensor's index.
            offset: the piece's first byte in the stored tensor.
            content: the piece, (bytes,) uint8, which must not change until the future is done.
            dtype: of the elements in `content`.
        """
        future = self._threads.submit(chunk_digests, content, dtype)
        self._pieces.setdefault((tensor, converted), {})[offset] = future
        return future

    def digest(self, tensor: int, converted: bool = False) -> str:
        """A tensor's digest (hex), once all of its pieces are added."""
        pieces = self._pieces.get((tensor, converted), {})
        return combined(digest for _, future in sorted(pieces.items()) for digest in future.result())
