"""The memory budget: bytes a run needs, part by part, and the error for a run that cannot fit.

The parts are counted from the model's configuration, before anything is loaded. The factors and constants of `FITS`
were fitted to measured peaks. On an H100, for Llama 1.1B and 6.7B with 8,192 slots and Phi-3-medium with 4,096, in
bfloat16 with FlexAttention, the sum is within 1 % of the bytes that torch reserved. On two CPU cores, for Llamas of 55
to 625 MB with 512 to 8,192 slots, the sum is within 10 % of the process's peak.
"""

from dataclasses import asdict, dataclass

import torch

from cecompile.errors import UserError
from cecompile.model.layer_layout import PLACES
from cecompile.planning.sizes import Sizes, Streamed
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket, Geometry
from cecompile.workload.stage import data_size

MiB = 1 << 20

# Per device and engine: hidden states held at once in the model's width (three more in the MLP's width are always
# counted); memory of the activations, relative to these hidden states; bytes for workspaces and allocator rounding, and
# on a CPU for the compiler.
FITS = {
    ("cuda", "compiled"): (2, 1.2, 70 * MiB),
    ("cuda", "eager"): (2, 2.5, 70 * MiB),
    ("cpu", "compiled"): (8, 0.85, 95 * MiB),
    ("cpu", "eager"): (8, 1.0, 80 * MiB),
}
LOADING = {"cuda": 0, "cpu": 264 * MiB}  # bytes of the device's memory that reading files takes at most, and gives back
BUCKETS = 2  # all buckets' hidden states, in those of the largest: each is at most half as large as the one before
# Streamed layers take more, in hidden states of a pass and in bytes. Fitted on an H100 to Llamas of 0.5 GB (2,048 to
# 8,192 slots) and 13.5 GB (8,192); the sum is within 10 % of the bytes that torch reserved.
SPARE, FEEDING = {"cuda": 4, "cpu": 0}, {"cuda": 38 * MiB, "cpu": 0}
USABLE = {"cuda": 0.985, "cpu": 0.92}  # the share of the memory that a prediction may fill
# Bytes that stay free of torch's allocations where the GPU's memory is the host's: those that the process takes beside
# the allocator once its room is known (CUDA modules 0.3 GB, the compiler's Python and buffers 0.7 GB, measured on an
# H200 by scripts/unified_memory.py), and those of the system, which would end a process that took them.
SYSTEM = 300_000_000
UNIFIED_RESERVE = 1_100_000_000 + SYSTEM
STARTED = 1_100_000_000  # bytes of unified memory that the process takes before: imports, and the CUDA context


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes a run needs, by part.

    `cache` is for decoding. With `in_turns`, decoding and captured passes use one memory pool in turns. Where layers
    are streamed, `hidden` is for the passes under way, and `weights` has room for two layers.
    """

    weights: int
    activations: int
    mask: int
    head: int
    cache: int
    fixed: int
    loading: int
    in_turns: bool
    hidden: int = 0

    @property
    def total(self) -> int:
        """The peak. Reading ends before the rest begins."""
        passes = self.activations + self.mask + self.head
        working = max(passes, self.cache) if self.in_turns else passes + self.cache
        return self.weights + max(self.loading, self.hidden + working + self.fixed)

    def summary(self) -> dict[str, int]:
        """Bytes by part, and the `total`, which is less than the sum of parts used in turns."""
        left_out = {"in_turns"} if self.hidden else {"in_turns", "hidden"}
        return {name: n for name, n in asdict(self).items() if name not in left_out} | {"total": self.total}


@dataclass(frozen=True, slots=True)
class TargetDevice:
    """A device to plan for that this machine lacks. Models run in 16 bits on the device."""

    name: str  # for messages
    kind: str  # "cuda" or "cpu"
    room: int  # bytes that a prediction may fill


def budget(
    sizes: Sizes, geometry: Geometry, device: str, engine: str, decoding: DecodeShape | None = None,
    streamed: Streamed | None = None,
) -> Budget:  # fmt: skip
    """The budget of a run with buckets of at most this geometry.

    Args:
        device: "cpu" or "cuda".
        engine: "compiled" or "eager".
        decoding: the decoder's shape, where answers are decoded.
        streamed: counts of the layers, where layers are streamed; `sizes` then counts the rest of the model.
    """
    slots, chunk = geometry.rows * geometry.length, geometry.readout_chunk
    (widths, factor, fixed), in_turns = FITS[device, engine], (device, engine) == ("cuda", "compiled")
    per_slot = factor * (widths * sizes.width + 3 * sizes.inner) * sizes.itemsize
    pairs = 0 if geometry.blocks else geometry.rows * geometry.length**2
    logits = chunk * sizes.vocabulary
    read = resident = sizes.parameters * sizes.itemsize
    held = hidden = cache = 0
    if streamed is not None:
        held, read = PLACES * streamed.layer_bytes, resident + streamed.layers * streamed.layer_bytes
        data = data_size(Bucket(geometry.rows, geometry.length, -(-slots // chunk) * chunk), geometry.blocks)
        one_pass = slots * sizes.width * sizes.itemsize + 4 * data  # under way: hidden states and data
        hidden = (streamed.passes + BUCKETS + SPARE[device]) * one_pass
        fixed += FEEDING[device]
    if decoding is not None:  # keys and values, a step's mask over them, and the step's tokens
        tokens = decoding.step_tokens[0]
        step_mask = tokens * decoding.slots * (1 + (1 + sizes.groups) * sizes.itemsize)
        cache = decoding.slots * sizes.cached * sizes.itemsize + step_mask + int(tokens * per_slot if in_turns else 0)
    return Budget(
        weights=resident + held,
        activations=int(slots * per_slot) + sizes.states * slots * sizes.width * sizes.itemsize,
        mask=pairs * (sizes.itemsize + 1),
        head=logits * (sizes.itemsize if engine == "compiled" else sizes.itemsize + 8),
        cache=cache, fixed=fixed, hidden=hidden, in_turns=in_turns,
        loading=max(0, min(LOADING[device], read) - held),  # files are read before the layers' places are allocated
    )  # fmt: skip


def refuse(
    name: str, device: torch.device | str, needed: Budget, limit: int, slots: int, way_out: str | None = None
) -> UserError:
    """The error for a run that cannot fit. States the bytes needed, the bytes there are, and a way out if any."""
    there = f"{max(0, limit) / 1e9:.1f} GB are there on {device}" + (f"; {way_out}" if way_out else "")
    least = needed.weights + needed.fixed
    if least > limit:
        return UserError(f"{name}: weights alone need {least / 1e9:.1f} GB, {there}")
    needs = f"needs {needed.total / 1e9:.1f} GB with buckets of {slots} tokens, the smallest possible"
    return UserError(f"{name}: {needs}, {there}")
