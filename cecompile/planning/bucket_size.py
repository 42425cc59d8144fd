"""The size of buckets: as asked for, as recorded in the cache, as pays on the device, as fits into memory."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from cecompile.errors import UserError
from cecompile.planning import memory
from cecompile.planning.needs import Needs
from cecompile.planning.options import RunOptions
from cecompile.planning.room import Room
from cecompile.planning.sizes import StageSizes
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
    "cpu": Tuning(4096, 256, DecodeShape(slots=4096, lanes=32, step_tokens=(256, 32))),
    "cuda": Tuning(8192, 1024, DecodeShape(slots=16384, lanes=64, step_tokens=(512, 64))),
}
STREAMED_PASSES = 8  # at once, fewer only where even small buckets leave no room: so that reading can hide behind them
DENSE_ATTENTION = 2.0  # how many times as long as in a matrix product arithmetic takes there


class Sizing:
    """Chooses the largest bucket's shape for one model on one device.

    Args:
        name: the model's, for messages.
        config: the model's configuration.
        device: the device that runs the model.
        options: of the run. With a target device, shapes are chosen for that device, in 16 bits.
        ranks, sharers: see `Room`.

    Attributes:
        tuning: sizes that suit the device.
        needs: counts the bytes that the model needs.
        room: the memory that the run may fill.

    Raises:
        UserError: see `Needs`.
    """

    def __init__(
        self, name: str, config: Any, device: torch.device, options: RunOptions, ranks: Ranks = ALONE, sharers: int = 1
    ) -> None:
        self._name, self._config, self._device = name, config, device
        self._ranks, self._sharers = ranks, sharers
        self.options = options
        target = options.target_device
        self._kind = device.type if target is None else target.kind
        self._dtype = options.dtype if target is None else "bfloat16"
        self.tuning = TUNING[self._kind]
        self.needs = Needs(config, self._kind, self._dtype, options)
        self.room = Room(device, options, ranks, sharers)
        self._ceiling: int | None = None  # slots, once memory has run out on more

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
        stages, (layers, readout) = self.options.pipeline, costs(self._config)
        if stages > len(layers):
            raise UserError(f"--pipeline {stages}: {self._name} has {len(layers)} layers")
        stage_sizes = StageSizes(self._config, self._dtype, stages)
        last, slots = readouts * readout, self.options.tokens_per_bucket or self.tuning.tokens_per_bucket
        room = self.room.bytes() if fit else None
        while True:
            geometry = self._geometry(longest, slots, blocks)

            def needed(stage: int, first: int, end: int, geometry: Geometry = geometry) -> memory.Budget:
                return memory.budget(stage_sizes.of(stage, first, end), geometry, self._kind, engine)

            ends = split(layers, stages, last, lambda *span: room is None or needed(*span).total <= room)
            if ends is not None:
                self.needs.shares = tuple(shares_of(ends))
                return
            slots = min(slots, geometry.rows * geometry.length) // 2
            if slots < BLOCK and room is not None:
                break
        ends = split(layers, stages, last) or []
        fullest = max(map(needed, range(stages), [0, *ends], ends), key=lambda one: one.total)
        name = f"{self._name}: a stage of --pipeline {stages}"
        raise memory.refuse(name, self.room.where, fullest, room, geometry.rows * geometry.length)

    def geometry(
        self, longest: int, *, blocks: bool, recorded: dict[str, Any] | None = None, shared: int = 0
    ) -> Geometry:
        """Returns the shape that is fastest, whatever the memory.

        Args:
            longest: inputs of the longest sequence.
            blocks: whether attention is block-sparse.
            recorded: the cache entry's manifest. A recorded fastest size is taken. Where rows must be longer than
                usual, a geometry that is compiled already is taken.
            shared: tokens that questions side by side typically share.
        """
        recorded = recorded if recorded and self.options.target_device is None else {}
        tokens = self.options.tokens_per_bucket or self.tuning.tokens_per_bucket
        if self.options.tokens_per_bucket is None and recorded.get("tuned"):
            tokens = recorded["tuned"][0] * recorded["tuned"][1]
        if self._ceiling is not None:
            tokens = min(tokens, self._ceiling)
        own = self._geometry(longest, tokens, blocks, shared)
        usual = self._geometry(1, tokens, blocks)
        if self.options.tokens_per_bucket is None and own.length > usual.length:
            known = [(g[1], g[0]) for g in recorded.get("geometries", ()) if g[1] >= own.length]
            if known and min(known)[0] <= 2 * own.length:
                length, rows = min(known)
                return Geometry(rows, length, own.readout_chunk, blocks)
        return own

    def fitting(self, wanted: Geometry, longest: int, engine: str, answer: int = 0) -> Geometry:
        """`wanted`, or the largest shape below it that fits the memory there is.

        Args:
            wanted: the result of `geometry`.
            longest: inputs of the longest sequence.
            engine: "compiled" or "eager".
            answer: tokens of the longest prompt and its answer together, where answers are decoded.

        Raises:
            UserError: none does, or the size was asked for and does not.
        """
        room, beside = self.room.bytes(), self._least_decoding(answer)
        geometry, passes = wanted, STREAMED_PASSES
        while True:
            needed = self.needs.budget(geometry, engine, beside, passes=passes)
            if needed.total <= room:
                break
            slots = geometry.rows * geometry.length
            smaller = self._geometry(longest, slots // 2, wanted.blocks)
            if smaller.rows * smaller.length < slots and slots // 2 >= BLOCK:
                geometry = smaller
            elif self.needs.streamed is not None and passes > 1:
                passes -= 1
            else:
                way_out = None if answer else self._way_out(geometry, engine, room)
                raise memory.refuse(self._name, self.room.where, needed, room, slots, way_out)
        if geometry != wanted and self.options.tokens_per_bucket is not None:
            slots, most = wanted.rows * wanted.length, geometry.rows * geometry.length
            needed = self.needs.budget(wanted, engine, beside)
            needs = f"{self._name}: needs {needed.total / 1e9:.1f} GB with buckets of {slots} tokens"
            there = f"{room / 1e9:.1f} GB are there on {self.room.where}"
            raise UserError(f"{needs}, {there}; --tokens-per-bucket {most} fits")
        return geometry

    def decoding(
        self, geometry: Geometry, engine: str, answer: int, fit: bool, all_answers: int | None = None
    ) -> DecodeShape | None:
        """Returns the decoder's shape: the largest cache that pays and, with `fit`, that memory holds.

        Args:
            answer: tokens of the longest prompt and its answer together; 0 where nothing is decoded.
            all_answers: tokens of all prompts and their answers together; None where the data is not known yet.
        """
        least, usual = self._least_decoding(answer), self.tuning.decoding
        if least is None:
            return None
        slots = least.slots if self._ceiling is not None else max(usual.slots, least.slots)
        while all_answers is not None and slots // 2 > max(all_answers, least.slots):
            slots //= 2
        while slots > least.slots:
            larger = replace(usual, slots=slots)
            if not fit or self.needs.budget(geometry, engine, larger).total <= self.room.bytes():
                return larger
            slots = max(least.slots, slots // 2)
        return least

    def of_size(self, tokens_per_bucket: int) -> "Sizing":
        """A sizing that differs by the bucket size asked for."""
        options = replace(self.options, tokens_per_bucket=tokens_per_bucket)
        out = Sizing(self._name, self._config, self._device, options, self._ranks, self._sharers)
        out.room = self.room
        return out

    def step_down(self, geometry: Geometry) -> bool:
        """Halves the size of buckets with which memory has run out. False where half is too small or impossible.

        On a CPU a quarter is left: a pass allocates memory anew there, and one that just fits may fail next time.
        """
        slots = geometry.rows * geometry.length
        as_small_as_rows_allow = self._ceiling is not None and slots > self._ceiling
        if as_small_as_rows_allow or slots // 2 < BLOCK:
            return False
        self._ceiling = max(BLOCK, slots // (4 if self._device.type == "cpu" else 2))
        return True

    def _way_out(self, geometry: Geometry, engine: str, room: int) -> str | None:
        """The option with which a run fits that is too large; None if no option helps."""
        if self.needs.streamed is not None:
            return None
        options = replace(self.options, stream_weights=True, pipeline=1)
        try:
            streamed = Needs(self._config, self._kind, self._dtype, options)
        except UserError:
            return None
        fits = streamed.budget(geometry, engine).total <= room
        return "--stream-weights reads them layer by layer" if fits else None

    def _least_decoding(self, answer: int) -> DecodeShape | None:
        """The smallest decoder for answers of this length."""
        if not answer:
            return None
        usual = self.tuning.decoding
        slots = max(answer, *usual.step_tokens) + 1
        return replace(usual, slots=-(-slots // BLOCK) * BLOCK)

    def _geometry(self, longest: int, tokens: int, blocks: bool, shared: int = 0) -> Geometry:
        key_cost = DENSE_ATTENTION * self.needs.model_sizes().key_cost if shared and not blocks else 0.0
        return choose_geometry(
            longest, tokens_per_bucket=tokens, blocks=blocks, readout_chunk=self.tuning.readout_chunk, shared=shared,
            key_cost=key_cost,
        )  # fmt: skip
