"""The memory budget: what a run needs, part by part, and the error for one that cannot fit.

The parts are counted from the model's configuration, before anything is loaded. How far activations exceed the count,
and what comes on top, was fitted to measured peaks: on an H100 of Llama 1.1B and 6.7B with 8,192 slots and of
Phi-3-medium with 4,096, in bfloat16 with FlexAttention, where the sum is within 1 % of what torch reserved; and on two
CPU cores of Llamas of 55 to 625 MB with 512 to 8,192 slots, where it is within 10 % of the process's peak.
"""

from dataclasses import asdict, dataclass

import torch

from cecompile.device import is_the_hosts
from cecompile.errors import UserError
from cecompile.model.layer_layout import PLACES
from cecompile.planning.sizes import Sizes, Streamed
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket, Geometry
from cecompile.workload.stage import data_size

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run's memory follows from its shapes.

    Attributes:
        widths: hidden states of the model's width held at once; beside three of the MLP's.
        factor: how many times that the activations take.
        fixed: bytes for workspaces and allocator rounding, and where the process itself is counted, the compiler.
    """

    widths: int
    factor: float
    fixed: int


FITS = {
    ("cuda", "compiled"): Fit(2, 1.2, 70 * MiB),
    ("cuda", "eager"): Fit(2, 2.5, 70 * MiB),
    ("cpu", "compiled"): Fit(8, 0.85, 95 * MiB),
    ("cpu", "eager"): Fit(8, 1.0, 80 * MiB),
}
LOADING = {"cuda": 0, "cpu": 264 * MiB}  # bytes of the device's memory that reading files takes at most, and gives back
BUCKETS = 2  # largest ones that all buckets' hidden states take: each is at most half as large as the one before
# What streamed layers take beside that, in passes' hidden states and in bytes: on an H100 of Llamas of 0.5 GB (2,048 to
# 8,192 slots) and 13.5 GB (8,192), where the sum is within 10 % of what torch reserved.
SPARE, FEEDING = {"cuda": 4, "cpu": 0}, {"cuda": 38 * MiB, "cpu": 0}
USABLE = {"cuda": 0.985, "cpu": 0.92}  # the share of the memory that a prediction may fill


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes a run needs, by part.

    `cache` is all that decoding takes. Where passes are captured it takes its turn with them (`in_turns`) in one pool.
    `hidden` is what passes under way take where layers are streamed; `weights` then holds two layers.
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
        """The peak: reading is over when the rest begins."""
        passes = self.activations + self.mask + self.head
        working = max(passes, self.cache) if self.in_turns else passes + self.cache
        return self.weights + max(self.loading, self.hidden + working + self.fixed)

    def summary(self) -> dict[str, int]:
        """Bytes by part, and the `total`, which is less than the sum of parts that take turns."""
        parts = asdict(self)
        del parts["in_turns"]
        if not self.hidden:
            del parts["hidden"]
        return parts | {"total": self.total}


@dataclass(frozen=True, slots=True)
class TargetDevice:
    """A device that is planned for and is not here, on which models run in 16 bits.

    Attributes:
        name: for messages.
        kind: "cuda" or "cpu".
        room: bytes that a prediction may fill.
        tokens_per_bucket: slots of a pass, where memory suffices and nothing else is asked for.
    """

    name: str
    kind: str
    room: int
    tokens_per_bucket: int


def budget(
    sizes: Sizes, geometry: Geometry, device: str, engine: str, decoding: DecodeShape | None = None,
    streamed: Streamed | None = None,
) -> Budget:  # fmt: skip
    """What a run with buckets of at most this geometry needs on the device.

    Args:
        device: "cpu" or "cuda".
        engine: "compiled" or "eager".
        decoding: what decodes beside the buckets.
        streamed: the layers, where they are; `sizes` is then of what is beside them.
    """
    slots = geometry.rows * geometry.length
    fit, in_turns = FITS[device, engine], (device, engine) == ("cuda", "compiled")
    per_slot = fit.factor * (fit.widths * sizes.width + 3 * sizes.inner) * sizes.itemsize
    pairs = 0 if geometry.blocks else geometry.rows * geometry.length**2
    logits = geometry.readout_chunk * sizes.vocabulary
    resident = sizes.parameters * sizes.itemsize
    held = 0 if streamed is None else PLACES * streamed.layer_bytes
    read = resident if streamed is None else resident + streamed.layers * streamed.layer_bytes
    return Budget(
        weights=resident + held,
        activations=int(slots * per_slot) + sizes.states * slots * sizes.width * sizes.itemsize,
        mask=pairs * (sizes.itemsize + 1),
        head=logits * (sizes.itemsize if engine == "compiled" else sizes.itemsize + 8),
        cache=0 if decoding is None else _cache(sizes, decoding, per_slot if in_turns else 0),
        fixed=fit.fixed + (0 if streamed is None else FEEDING[device]),
        loading=max(0, min(LOADING[device], read) - held),  # the two layers' places are made after it
        in_turns=in_turns,
        hidden=0 if streamed is None else (streamed.passes + BUCKETS + SPARE[device]) * pass_bytes(sizes, geometry),
    )


def pass_bytes(sizes: Sizes, geometry: Geometry) -> int:
    """Bytes that a pass takes which is under way: its hidden states, and its data."""
    slots, chunk = geometry.rows * geometry.length, geometry.readout_chunk
    bucket = Bucket(geometry.rows, geometry.length, -(-slots // chunk) * chunk)
    return slots * sizes.width * sizes.itemsize + 4 * data_size(bucket, geometry.blocks)


def _cache(sizes: Sizes, decoding: DecodeShape, per_token: float) -> int:
    """Bytes of all keys and values, and of a step: its mask over them, and what each of its tokens takes."""
    tokens = decoding.step_tokens[0]
    mask = tokens * decoding.slots * (1 + (1 + sizes.groups) * sizes.itemsize)
    return decoding.slots * sizes.cached * sizes.itemsize + mask + int(tokens * per_token)


def reading(device: torch.device) -> int:
    """Bytes of the device's memory that are taken while files are read."""
    return LOADING["cpu"] if is_the_hosts(device) else 0


def refuse(
    name: str, device: torch.device | str, needed: Budget, limit: int, slots: int, way_out: str | None = None
) -> UserError:
    """The error for a run that cannot fit, with what it needs and what there is, and a way out if there is one."""
    there = f"{max(0, limit) / 1e9:.1f} GB are there on {device}" + (f"; {way_out}" if way_out else "")
    if needed.weights + needed.fixed > limit:
        return UserError(f"{name}: weights alone need {(needed.weights + needed.fixed) / 1e9:.1f} GB, {there}")
    return UserError(
        f"{name}: needs {needed.total / 1e9:.1f} GB with buckets of {slots} tokens, the smallest possible, {there}"
    )
