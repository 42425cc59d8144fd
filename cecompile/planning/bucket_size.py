"""How large a bucket may be: what is asked for, what is recorded in the cache, what pays on the device, what fits."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from cecompile import device as device_memory
from cecompile.errors import UserError
from cecompile.model.structure import LayerRange
from cecompile.planning import memory
from cecompile.planning import sizes as sizes_module
from cecompile.planning.stages import costs, split
from cecompile.planning.stages import shares as shares_of
from cecompile.ranks import ALONE, Ranks
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import BLOCK, Geometry, choose_geometry


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes that suit a kind of device.

    Attributes:
        tokens_per_bucket: slots a pass.
        readout_chunk: readouts whose logits are held at once.
        decoding: the cache where memory leaves the choice, and its steps.
    """

    tokens_per_bucket: int
    readout_chunk: int
    decoding: DecodeShape


TUNING = {
    "cpu": Tuning(4096, 256, DecodeShape(slots=4096, lanes=16, step_tokens=(256, 16))),
    "cuda": Tuning(8192, 1024, DecodeShape(slots=16384, lanes=64, step_tokens=(512, 64))),
}
STREAMED_PASSES = 8  # at once, fewer only where even small buckets leave no room: so that reading can hide behind them
DENSE_ATTENTION = 2.0  # how many times as long as in a matrix product arithmetic takes there


class Sizing:
    """Chooses the largest bucket's shape for one model on one device.

    Args:
        name: the model's, for messages.
        config: the model's configuration.
        device: where it runs.
        dtype: as asked for.
        tokens_per_bucket: as asked for; None leaves the choice.
        limit: bytes the run may take; None is what the device has.
        ranks: that have to come to the same sizes, each with its own memory.
        sharers: how many of them share the device.
        stages: of a pipeline, among which the layers are to be divided.
        stream: the layers' weights are streamed.
        target_device: a device that is planned for in place of `device`, in 16 bits; it has its own limit.

    Attributes:
        shares: what each stage holds, once `divide` has said it; empty where there is one device for all.
        tuning: sizes that suit the device.
        limit: bytes the run may take, once known.

    Raises:
        UserError: `stream` is set, but this model's layers cannot be streamed.
    """

    def __init__(
        self,
        name: str,
        config: Any,
        device: torch.device,
        dtype: str,
        tokens_per_bucket: int | None,
        limit: int | None,
        ranks: Ranks = ALONE,
        sharers: int = 1,
        stages: int = 1,
        stream: bool = False,
        target_device: memory.TargetDevice | None = None,
    ) -> None:
        self._name = name
        self._config = config
        self._device = device
        self._target_device = target_device
        self._kind = device.type if target_device is None else target_device.kind
        self._where = device if target_device is None else target_device.name
        self._dtype = dtype if target_device is None else "bfloat16"
        self._asked = tokens_per_bucket
        self._asked_limit = limit
        self._ranks = ranks
        self._sharers = sharers
        self.stages = stages
        self.shares: tuple[LayerRange, ...] = ()
        self._ceiling: int | None = None  # slots, once memory has run out on more
        self._sizes: dict[LayerRange | None, sizes_module.Sizes] = {}
        self.tuning = TUNING[self._kind]
        if target_device is not None:
            self.tuning = replace(self.tuning, tokens_per_bucket=target_device.tokens_per_bucket)
        self.limit: int | None = limit
        self._baseline_bytes: int | None = None  # bytes in use before anything is loaded, where they count
        self.streamed: sizes_module.Streamed | None = None
        if stream:
            self.streamed = sizes_module.streamed_sizes(config, self.model_sizes().itemsize)

    def count_as_loaded(self, size: int) -> None:
        """Weights of `size` bytes are on the device already: they are part of what is needed, and of what there is."""
        self._baseline_bytes = 0
        if self._asked_limit is None:
            self.limit = device_memory.available(self._device) + (size if self._device.type == "cpu" else 0)

    def divide(self, readouts: float, longest: int, engine: str, blocks: bool, fit: bool) -> None:
        """Divides the layers among the stages, so that the slowest is as fast as can be; with `fit`, as memory allows.

        Buckets are as large as usual, or where nothing fits then, half as large, and so on.

        Args:
            readouts: a token, about.
            longest: inputs of the longest sequence.
            engine: "compiled" or "eager".
            blocks: whether attention is block-sparse.

        Raises:
            UserError: there are more stages than layers, or a stage does not fit.
        """
        layers, readout = costs(self._config)
        if self.stages > len(layers):
            raise UserError(f"--pipeline {self.stages}: {self._name} has {len(layers)} layers")
        stage_sizes = sizes_module.StageSizes(self._config, self._dtype, self.stages)
        last, slots = readouts * readout, self._asked or self.tuning.tokens_per_bucket
        room = self._room() if fit else None
        while True:
            geometry = self._geometry(longest, slots, blocks)

            def needed(stage: int, first: int, end: int, geometry: Geometry = geometry) -> memory.Budget:
                return memory.budget(stage_sizes.of(stage, first, end), geometry, self._kind, engine)

            ends = split(layers, self.stages, last, lambda *span: room is None or needed(*span).total <= room)
            if ends is not None:
                self.shares = tuple(shares_of(ends))
                return
            slots = min(slots, geometry.rows * geometry.length) // 2
            if slots < BLOCK:
                break
        assert room is not None
        ends = split(layers, self.stages, last) or []
        fullest = max(map(needed, range(self.stages), [0, *ends], ends), key=lambda one: one.total)
        name = f"{self._name}: a stage of --pipeline {self.stages}"
        raise memory.refuse(name, self._where, fullest, room, geometry.rows * geometry.length)

    def geometry(
        self, longest: int, *, blocks: bool, recorded: dict[str, Any] | None = None, shared: int = 0
    ) -> Geometry:
        """The shape that pays, whatever the memory.

        Args:
            longest: inputs of the longest sequence.
            blocks: whether attention is block-sparse.
            recorded: the cache entry's manifest. A size found fastest before is taken; and where rows have to be
                longer than usual, those of a geometry that is compiled already.
            shared: tokens that questions side by side typically share.
        """
        recorded = recorded if recorded and self._target_device is None else {}
        tokens = self._asked or self.tuning.tokens_per_bucket
        if self._asked is None and recorded.get("tuned"):
            tokens = recorded["tuned"][0] * recorded["tuned"][1]
        if self._ceiling is not None:
            tokens = min(tokens, self._ceiling)
        own = self._geometry(longest, tokens, blocks, shared)
        usual = self._geometry(1, tokens, blocks)
        if self._asked is None and own.length > usual.length:
            known = [(g[1], g[0]) for g in recorded.get("geometries", ()) if g[1] >= own.length]
            if known and min(known)[0] <= 2 * own.length:
                length, rows = min(known)
                return Geometry(rows, length, own.readout_chunk, blocks)
        return own

    def fitting(self, wanted: Geometry, longest: int, engine: str, answer: int = 0) -> Geometry:
        """`wanted`, or the largest shape below it that fits the memory there is.

        Args:
            wanted: what `geometry` says.
            longest: inputs of the longest sequence.
            engine: "compiled" or "eager".
            answer: tokens of the longest prompt and its answer together, where answers are decoded.

        Raises:
            UserError: none does, or the size was asked for and does not.
        """
        room, beside = self._room(), self._least_decoding(answer)
        geometry, passes = wanted, STREAMED_PASSES
        while True:
            needed = self.budget(geometry, engine, beside, passes=passes)
            if needed.total <= room:
                break
            slots = geometry.rows * geometry.length
            smaller = self._geometry(longest, slots // 2, wanted.blocks)
            if smaller.rows * smaller.length < slots and slots // 2 >= BLOCK:
                geometry = smaller
            elif self.streamed is not None and passes > 1:
                passes -= 1
            else:
                way_out = None if answer else self._way_out(geometry, engine, room)
                raise memory.refuse(self._name, self._where, needed, room, slots, way_out)
        if geometry != wanted and self._asked is not None:
            slots, most = wanted.rows * wanted.length, geometry.rows * geometry.length
            raise UserError(
                f"{self._name}: needs {self.budget(wanted, engine, beside).total / 1e9:.1f} GB with buckets of {slots} "
                f"tokens, {room / 1e9:.1f} GB are there on {self._where}; --tokens-per-bucket {most} fits"
            )
        return geometry

    def decoding(self, geometry: Geometry, engine: str, answer: int, fit: bool) -> DecodeShape | None:
        """The decoder beside buckets of this geometry: the largest cache that pays and, with `fit`, memory holds.

        Args:
            answer: tokens of the longest prompt and its answer together; 0 where nothing is decoded.
        """
        least, usual = self._least_decoding(answer), self.tuning.decoding
        if least is None:
            return None
        slots = least.slots if self._ceiling is not None else max(usual.slots, least.slots)
        while slots > least.slots:
            larger = replace(usual, slots=slots)
            if not fit or self.budget(geometry, engine, larger).total <= self._room():
                return larger
            slots = max(least.slots, slots // 2)
        return least

    def budget(
        self, geometry: Geometry, engine: str, decoding: DecodeShape | None = None, passes: int = 1
    ) -> memory.Budget:
        """Bytes that a run with this geometry needs, by part.

        Of several stages it is the one that needs most.

        Args:
            passes: under way at once, where layers are streamed.
        """
        return max(self.budgets(geometry, engine, decoding, passes), key=lambda one: one.total)

    def budgets(
        self, geometry: Geometry, engine: str, decoding: DecodeShape | None = None, passes: int = 1
    ) -> list[memory.Budget]:
        """The same of each stage."""
        streamed, shares = self.streamed, self.shares or (None,)
        if streamed is not None:
            shares = (LayerRange(0, 0, streamed.layers),)
            streamed = replace(streamed, passes=passes)
        sizes = [self.model_sizes(share) for share in shares]
        return [memory.budget(one, geometry, self._kind, engine, decoding, streamed) for one in sizes]

    def fits_beside_reading(self, geometry: Geometry, engine: str) -> bool:
        """Whether memory holds passes of this geometry and what reading files takes at once; see `budget`."""
        return self.budget(geometry, engine).total + memory.reading(self._device) <= self._room()

    def passes_at_once(self, geometry: Geometry, engine: str, passes: int) -> int:
        """How many of `passes` go through a streamed layer at once: as many as memory holds, in sweeps of one size.

        For `geometry` and `engine` see `budget`.
        """
        one, two = (self.budget(geometry, engine, None, n) for n in (1, 2))
        most = max(1, 1 + (self._room() - one.total) // (two.hidden - one.hidden))
        return -(-passes // -(-passes // most))

    def model_sizes(self, share: LayerRange | None = None) -> sizes_module.Sizes:
        """The sizes of the model, or of a share of the model, that decide memory and cost."""
        if share not in self._sizes:
            self._sizes[share] = sizes_module.model_sizes(self._config, self._dtype, share)
        return self._sizes[share]

    def of_size(self, tokens_per_bucket: int) -> "Sizing":
        """The same, asked for this size."""
        stream = self.streamed is not None
        out = Sizing(
            self._name, self._config, self._device, self._dtype, tokens_per_bucket, self._asked_limit, stream=stream
        )
        out._ranks, out._sharers = self._ranks, self._sharers
        out.limit, out._baseline_bytes = self.limit, self._baseline_bytes
        return out

    def step_down(self, geometry: Geometry) -> bool:
        """After memory has run out: from now on at most half as large. False where that cannot be or is too small.

        On a CPU a quarter: every pass takes its memory anew there, so that one which fits once, and only just, need not
        fit again.
        """
        slots = geometry.rows * geometry.length
        as_small_as_rows_allow = self._ceiling is not None and slots > self._ceiling
        if as_small_as_rows_allow or slots // 2 < BLOCK:
            return False
        self._ceiling = max(BLOCK, slots // (4 if self._device.type == "cpu" else 2))
        return True

    def _way_out(self, geometry: Geometry, engine: str, room: int) -> str | None:
        """The option that lets a run fit which does not; None without one."""
        if self.streamed is not None:
            return None
        try:
            other = Sizing(
                self._name,
                self._config,
                self._device,
                self._dtype,
                None,
                None,
                stream=True,
                target_device=self._target_device,
            )
        except UserError:
            return None
        fits = other.budget(geometry, engine).total <= room
        return "--stream-weights reads them layer by layer" if fits else None

    def _room(self) -> int:
        """Bytes that a prediction may fill."""
        if self._target_device is not None:
            return self._target_device.room
        if self._baseline_bytes is None:  # before anything is loaded: what is loaded later is part of what is needed
            held = device_memory.used_already(self._device) if self._asked_limit is not None else 0
            self._baseline_bytes = -self._ranks.all_reduce_min(-held)
        if self.limit is None:
            self.limit = self._ranks.all_reduce_min(device_memory.available(self._device) // self._sharers)
        return int(self.limit * memory.USABLE[self._device.type]) - self._baseline_bytes

    def _least_decoding(self, answer: int) -> DecodeShape | None:
        """The smallest decoder for answers of this length."""
        if not answer:
            return None
        usual = self.tuning.decoding
        slots = max(answer, *usual.step_tokens) + 1
        return replace(usual, slots=-(-slots // BLOCK) * BLOCK)

    def _geometry(self, longest: int, tokens: int, blocks: bool, shared: int = 0) -> Geometry:
        return choose_geometry(
            longest,
            tokens_per_bucket=tokens,
            blocks=blocks,
            readout_chunk=self.tuning.readout_chunk,
            shared=shared,
            key_cost=DENSE_ATTENTION * self.model_sizes().key_cost if shared and not blocks else 0.0,
        )
