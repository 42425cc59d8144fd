"""Trials before a run: each does a little of what the run will do on this machine, and keeps the outcome as data."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import LlamaConfig

from cecompile import device as device_memory
from cecompile import procfs
from cecompile.engine import initialise
from cecompile.engine.cuda_graph import capture
from cecompile.engine.probe import choose_attention
from cecompile.errors import UserError, first_line, printable
from cecompile.model.checkpoint import checkpoint_files
from cecompile.model.sample import sample_model
from cecompile.planning.memory import SYSTEM

NVMAP = "dev/nvmap"  # all memory of a Jetson's GPU is allocated through this node
OTHER_NODES = (*(f"dev/nvgpu/igpu0/{name}" for name in ("as", "channel", "ctrl", "tsg")), "dev/dri/renderD*")
CHUNK = 512 * 2**20  # bytes: more than any tensor of a model of 14 billion parameters
TOUCHED = 16  # of host memory one page in so many is written to
SAMPLE = 64 * 2**20  # bytes of a checkpoint that are read
PIECE = 8 * 2**20


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run that is planned, but not begun.

    Attributes:
        model: a directory or hub id.
        device, dtype: those that the model runs on and in.
        engine: "compiled", "eager" or "reference".
        attention: the attention planned for; with `another_will_do` the run can fall back on another.
        head_size: values of an attention head.
        needed_bytes: memory that the run allocates on the device.
        predicted_bytes: the run's predicted peak.
        cache: the directory of compiled code; None does without.
    """

    model: str
    device: torch.device
    dtype: torch.dtype
    engine: str
    attention: str
    another_will_do: bool
    head_size: int
    needed_bytes: int
    predicted_bytes: int
    cache: Path | None


@dataclass(frozen=True, slots=True)
class Node:
    """A device node; `usable` says that this user may read and write it."""

    path: str
    there: bool
    group: str | None
    usable: bool


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory that was allocated and freed again: `taken` of `wanted` bytes, `touched` of them written to."""

    wanted: int
    taken: int
    touched: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes of a checkpoint that were read past the page cache, and the checkpoint's size; no time, not measured."""

    total_bytes: int
    read_bytes: int = 0
    seconds: float = 0.0
    problem: str | None = None

    @property
    def rate(self) -> float | None:
        """Bytes a second; None where nothing was measured."""
        return self.read_bytes / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt to compile or to capture, which took `seconds`; `problem` is the reason of a failure."""

    seconds: float
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Trials:
    """The outcomes. A trial that was left out is None.

    Attributes:
        nodes: device nodes of a Jetson's GPU; empty on other machines.
        free_bytes: host memory that not even the page cache uses, after the memory trial; None where unknown.
        disk_free_bytes: free for the cache of compiled code.
    """

    nodes: tuple[Node, ...]
    memory: Allocation
    free_bytes: int | None
    reading: Reading
    disk_free_bytes: int | None
    compiled_pass: Attempt | None
    graph: Attempt | None


def try_all(run: PlannedRun, jetson: bool, root: Path = procfs.ROOT, *, quick: bool = False) -> Trials:
    """Tries the machine; with `quick` without compiling, capturing and measuring the disk.

    Capturing needs the device to itself, and the disk may already be read ahead: a run has begun both by then.
    """
    memory = try_memory(run.device, run.needed_bytes)
    compiled = run.engine == "compiled" and not quick
    return Trials(
        nodes=read_nodes(root) if jetson else (),
        memory=memory,
        free_bytes=procfs.read_meminfo(root).get("MemFree"),
        reading=try_reading(run.model, 0 if quick else SAMPLE),
        disk_free_bytes=None if run.cache is None else disk_free(run.cache),
        graph=try_graph(run.device) if compiled and run.device.type == "cuda" else None,
        compiled_pass=try_compiled_pass(run) if compiled else None,
    )


def read_nodes(root: Path) -> tuple[Node, ...]:
    """The device nodes of a Jetson's GPU: NVMAP in any case, others where they exist."""
    return tuple(_node(root, path) for path in (root / NVMAP, *chain(*(sorted(root.glob(n)) for n in OTHER_NODES))))


def _node(root: Path, path: Path) -> Node:
    shown = f"/{path.relative_to(root)}"
    try:
        number = path.stat().st_gid
    except OSError:
        return Node(shown, False, None, False)
    try:
        group = path.group()
    except KeyError:  # a container need not know the host's groups
        group = str(number)
    return Node(shown, True, group, os.access(path, os.R_OK | os.W_OK))


def try_memory(device: torch.device, wanted: int) -> Allocation:
    """Allocates `wanted` bytes in chunks, and frees them.

    Host memory is reserved, and a share of its pages touched: the pages of a Python process come back late. Where the
    GPU's memory is the host's, allocating ends before the system's own memory is touched, because the system would end
    this process rather than report an error.
    """
    if device.type == "cpu" and (left := procfs.memory_left() - SYSTEM) < wanted:
        return Allocation(wanted, max(0, left), 0)
    chunks: list[Tensor] = []
    taken, problem, shared = 0, None, device_memory.is_integrated(device)
    try:
        while taken < wanted:
            size = min(CHUNK, wanted - taken)
            if shared and procfs.memory_left() < size + SYSTEM:
                break
            chunks.append(torch.empty(size, dtype=torch.uint8, device=device))
            chunks[-1][: size if device.type == "cuda" else -(-size // TOUCHED)].fill_(1)
            taken += size
    except (RuntimeError, MemoryError) as error:
        problem = printable(first_line(error), 120)
    chunks.clear()
    device_memory.give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the run's own peak is to be recorded
    return Allocation(wanted, taken, taken if device.type == "cuda" else taken // TOUCHED, problem)


def try_reading(model: str, most: int) -> Reading:
    """Opens all files of a checkpoint, and reads up to `most` bytes of the first past the page cache."""
    try:
        files, total = checkpoint_files(model), 0
        if not files:
            return Reading(0, problem=f"{model}: has no safetensors files")
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                total += os.fstat(opened.fileno()).st_size
        read, seconds = _read(files[0], most) if most else (0, 0.0)
        return Reading(total, read, seconds)
    except UserError as error:
        return Reading(0, problem=str(error))
    except OSError as error:
        return Reading(0, problem=f"{error.filename}: cannot be read: {error.strerror}")


def _read(file: Path, most: int) -> tuple[int, float]:
    """The bytes that were read of a file, and the seconds that reading took."""
    content, read = bytearray(PIECE), 0
    with open(file, "rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, most, os.POSIX_FADV_DONTNEED)
        began = perf_counter()
        while read < most and (count := opened.readinto(content)):
            read += count
        return read, perf_counter() - began


def disk_free(directory: Path) -> int | None:
    """Bytes that are free in a directory that may not exist yet; None where the system does not say."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None


def try_graph(device: torch.device) -> Attempt:
    """Captures one CUDA graph and replays the graph. No other thread may use the device meanwhile."""

    def captured() -> str | None:
        counted = torch.zeros(256, device=device)

        def forward() -> None:
            counted.add_(1)

        with torch.cuda.device(device):
            capture(forward, torch.cuda.graph_pool_handle()).replay()
            # forward ran before the capture and in the replay; the capture itself adds nothing
            return None if counted.eq(2).all() else "a replay does not compute what was captured"

    return _attempt(captured)


def try_compiled_pass(run: PlannedRun) -> Attempt:
    """Compiles for a tiny model with heads of the run's size: the run's attention, compared with the stock model's.

    FlexAttention is compiled as in a run. An MLP is compiled too, for attention that does without a compiler. Nothing
    is taken from a cache, or left in one.
    """

    def compiled() -> None:
        initialise.begin(run.device).join()
        config = LlamaConfig(
            vocab_size=64, hidden_size=2 * run.head_size, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=run.head_size,
        )  # fmt: skip
        model = sample_model(config, run.dtype, run.device)
        choose_attention(model, run.attention)
        states = torch.ones(1, 64, 2 * run.head_size, dtype=run.dtype, device=run.device)
        with torch.inference_mode():
            torch.compile(model.model.layers[0].mlp, dynamic=False)(states)

    with _own_caches():
        return _attempt(compiled)


@contextmanager
def _own_caches() -> Iterator[None]:
    """Makes the compilers keep their files in a directory that lives as long as this context."""
    with tempfile.TemporaryDirectory(prefix="cecompile-") as directory:
        own = {"TORCHINDUCTOR_CACHE_DIR": directory, "TRITON_CACHE_DIR": f"{directory}/triton"}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _attempt(what: Callable[[], str | None]) -> Attempt:
    began, problem = perf_counter(), None
    try:
        problem = what()
    except Exception as error:  # a compiler or driver may raise anything
        problem = f"{type(error).__name__}: {printable(first_line(error), 200)}"
    return Attempt(perf_counter() - began, problem)
