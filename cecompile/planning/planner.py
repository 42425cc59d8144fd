"""The planner: from sequences to a plan that memory holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from cecompile import device as device_memory
from cecompile.errors import UserError
from cecompile.model.checkpoint import DTYPES
from cecompile.model.structure import LayerRange
from cecompile.model.support import boundary_of
from cecompile.planning import memory
from cecompile.planning.bucket_size import Sizing
from cecompile.ranks import Ranks
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.order import sort_sequences
from cecompile.workload.plan import Geometry, Plan, make_plan, with_room
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPlan
from cecompile.workload.totals import Totals


@dataclass(slots=True)
class Mode:
    """The engine and the attention in use.

    Attributes:
        engine: "compiled", "eager" or "reference".
        attention: "flex" or "sdpa".
        note: the reason where either is not what the user asked for, and what else a reader has to know.
    """

    engine: str
    attention: str
    note: str | None = None

    def remark(self, note: str | None) -> None:
        """Adds to the note; None adds nothing."""
        self.note = "; ".join(part for part in (self.note, note) if part) or None


class Planner:
    """Makes plans for one model on one device.

    Args:
        name: the model's, for messages.
        config: the model's configuration.
        device: the device that runs the plans.
        mode: the engine and attention that the plans are for.
        sizing: bucket sizes.
        ranks: the processes that share the work; all make the same plan.
        recorded: reads what the compile cache has recorded of this model.

    Attributes:
        config: the model's configuration.
        predicted_bytes: the memory budget of the last plan.
        loaded: True once the weights are in memory.
    """

    def __init__(
        self, name: str, config: Any, device: torch.device, mode: Mode, sizing: Sizing, ranks: Ranks,
        recorded: Callable[[], dict[str, Any]],
    ) -> None:  # fmt: skip
        self.sizing = sizing
        self.predicted_bytes: int | None = None
        self.loaded = False
        self._name, self.config, self._device = name, config, device
        self._mode = mode
        self._ranks = ranks
        self._recorded = recorded
        self._same_shapes = False
        self._before: Plan | None = None  # the next plan takes over its shapes
        self._ahead: tuple[int, int] | None = None  # lengths that every plan is made for, known before the data

    def shapes(
        self, longest: int, answer: int, fit: bool, sizing: Sizing | None = None, shared: int = 0,
        all_answers: int | None = None, recorded: dict[str, Any] | None = None,
    ) -> tuple[Geometry, DecodeShape | None]:  # fmt: skip
        """Returns the largest bucket's shape and the decoder's shape; with `fit`, shapes that memory holds together.

        Args:
            longest: inputs of the longest sequence.
            answer: tokens of the longest prompt and its answer together; 0 where nothing is decoded.
            fit: compare the shapes with the memory there is.
            sizing: another sizing than this planner's.
            shared: tokens that questions side by side typically share.
            all_answers: see `Sizing.decoding`.
            recorded: the compile cache's record, where it has been read already.

        Raises:
            UserError: nothing fits, or trees of this length are not exact.
        """
        self._check_rope(longest, answer)
        sizing = sizing or self.sizing
        blocks = self._mode.attention == "flex"
        recorded = self._in_cache() if recorded is None else recorded
        geometry = sizing.geometry(longest, blocks=blocks, recorded=recorded, shared=shared)
        if fit:
            geometry = sizing.fitting(geometry, longest, self._mode.engine, answer)
        return geometry, sizing.decoding(geometry, self._mode.engine, answer, fit, all_answers)

    def plan(self, sequences: Sequences, fit: bool, new_tokens: int = 0, sizing: Sizing | None = None) -> Plan:
        """Makes the plan for these sequences.

        Args:
            sequences: at least one.
            fit, sizing: see `shapes`.
            new_tokens: the most tokens of an answer; 0 where nothing is decoded.

        Raises:
            UserError: see `shapes`.
        """
        answer, all_answers = 0, None
        if new_tokens:
            answer = sequences.longest_prompt + new_tokens
            all_answers = sequences.prompt_tokens + new_tokens * (int(sequences.questions[-1]) + 1)
        longest = int(sequences.input_lengths.max())
        order = sort_sequences(sequences)
        if self.sizing.options.pipeline > 1 and not self.sizing.needs.shares:
            readouts = min(1.0, int(sequences.predicted.sum()) / order.prefix_tree_tokens)
            self.sizing.divide(readouts, longest, self._mode.engine, self._mode.attention == "flex", fit)
        ahead = None if self._ahead is None or sizing is not None else self.shapes(*self._ahead, fit=True)
        if ahead is not None and not _hold(*ahead, longest, answer):
            ahead = None
        before = self._before if sizing is None and ahead is None else None
        if before is not None and _hold(before.geometry, before.decoding, longest, answer):
            geometry, decoding, known = before.geometry, before.decoding, before.buckets
            recorded = None
        else:
            shared, known, recorded = order.typically_shared(sequences), (), self._in_cache()
            geometry, decoding = ahead or self.shapes(longest, answer, fit, sizing, shared, all_answers, recorded)
        boundary = boundary_of(self.config)
        shapes = recorded["buckets"] if recorded else ()
        compiled = [tuple(shape) for shape in shapes if len(shape) == 2]  # others are decoders'
        plan = make_plan(
            sequences, geometry, all_buckets=ahead is not None, order=order, buckets=known, boundary=boundary,
            tight=not self._same_shapes, compiled=compiled,
        )  # fmt: skip
        plan = replace(plan, decoding=decoding)
        if self._same_shapes and sizing is None and ahead is None:
            self._before = plan = with_room(plan, known)
        held = 0 if self.loaded else device_memory.used_already(self._device)
        self.predicted_bytes = self.budget(plan).total + held
        return plan

    @contextmanager
    def same_shapes(self) -> Iterator[None]:
        """Within this context a plan takes over the shapes of the plan before, if they hold its sequences."""
        self._same_shapes = True
        try:
            yield
        finally:
            self._same_shapes = False
            self.forget_shapes()

    def forget_shapes(self) -> None:
        """Lets the next plan choose its own shapes."""
        self._before = None

    def plan_ahead(self, longest: int, answer: int) -> None:
        """Gives all later plans for up to these lengths the same buckets; for the lengths see `shapes`."""
        self._ahead = longest, answer

    def budget(self, plan: Plan | Totals) -> memory.Budget:
        """Bytes that a run of this plan needs, by part; of a pipeline's stages, for the one that needs most."""
        passes = 1 if self.sizing.needs.streamed is None else self.passes_at_once(plan, _in_a_window(plan))
        return self.sizing.needs.budget(largest(plan), self._mode.engine, plan.decoding, passes)

    def stages(self, plan: Plan | Totals) -> list[dict[str, Any]] | None:
        """`plan --json`'s `stages`: of each its layers, from the first to before the last, and the bytes it needs."""
        if not self.sizing.needs.shares:
            return None
        budgets = self.sizing.needs.budgets(largest(plan), self._mode.engine, plan.decoding)
        return [
            {"layers": [share.first, share.last], "weights_bytes": one.weights, "total_bytes": one.total}
            for share, one in zip(self.sizing.needs.shares, budgets, strict=True)
        ]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the model runs in; None where only the checkpoint's tensors tell."""
        asked, own = self.sizing.options.dtype, getattr(self.config, "dtype", None)
        return own if asked == "auto" else DTYPES[asked]

    @property
    def share(self) -> LayerRange | None:
        """The layers that this rank holds, once planned; None is all of the model."""
        return self.sizing.needs.shares[self._ranks.stage] if self.sizing.needs.shares else None

    def passes_at_once(self, plan: Plan | Totals | StagedPlan, passes: int) -> int:
        """How many of `passes` go through a streamed layer together; see `Needs.passes_at_once`."""
        sizing = self.sizing
        return sizing.needs.passes_at_once(largest(plan), self._mode.engine, passes, sizing.room.bytes())

    def fits_beside_reading(self, plan: Plan) -> bool:
        """Whether memory holds a plan's passes and, at the same time, the buffers that reading files takes."""
        reading = memory.LOADING["cpu"] if device_memory.is_the_hosts(self._device) else 0
        return self.sizing.needs.budget(largest(plan), self._mode.engine).total + reading <= self.sizing.room.bytes()

    def planned_streaming(self, plan: Plan | Totals) -> dict[str, int] | None:
        """results.json's `streaming`, as far as known before a run of this plan."""
        streamed = self.sizing.needs.streamed
        if streamed is None:
            return None
        due, windows = _in_a_window(plan), plan.windows if isinstance(plan, Totals) else 1
        passes = self.passes_at_once(plan, due)
        sweeps, size = windows * -(-due // passes), streamed.layer_bytes
        read = sweeps * streamed.layers * size
        return {"sweeps": sweeps, "passes_per_sweep": passes, "layer_bytes": size, "read_bytes": read}

    @property
    def serves_more(self) -> bool:
        """Whether the shapes of a plan serve later plans too."""
        return self._same_shapes or self._ahead is not None

    def lacking(self, plan: Plan) -> int:
        """The number of a plan's buckets that the compile cache lacks."""
        held = {tuple(shape) for shape in self._in_cache()["buckets"]}
        return sum(bucket.shape not in held for bucket in plan.buckets)

    def _in_cache(self) -> dict[str, Any]:
        """The compile cache's record of this model on this device, the same on all ranks; empty for a target device."""
        recorded = {} if self.sizing.options.target_device else self._recorded()
        return self._ranks.broadcast({name: recorded.get(name) or () for name in ("tuned", "geometries", "buckets")})

    def _check_rope(self, longest: int, answer: int) -> None:
        """longrope picks one set of frequencies for a whole input, by its length: a longer answer changes the set."""
        boundary = boundary_of(self.config)
        if boundary is None or max(longest, answer) <= boundary:
            return
        if answer or self.sizing.options.pipeline > 1 or self.sizing.needs.streamed is not None:
            what = "answers" if answer else "layers in several places"
            tokens = f"up to {max(longest, answer)} tokens, where its longrope changes at {boundary}"
            raise UserError(f"{self._name}: {tokens}: not with {what}; --engine reference runs them")


def largest(plan: Plan | Totals | StagedPlan) -> Geometry:
    """The geometry of a plan's largest bucket."""
    bucket = plan.buckets[0]
    return Geometry(bucket.rows, bucket.length, plan.geometry.readout_chunk, plan.geometry.blocks)


def _hold(geometry: Geometry, decoding: DecodeShape | None, longest: int, answer: int) -> bool:
    """Whether these shapes hold sequences of these lengths."""
    return longest <= geometry.length and (decoding is None or answer < decoding.slots)


def _in_a_window(plan: Plan | Totals) -> int:
    """Passes in a plan; for a windowed run, the average per window."""
    runs = sum(plan.runs(i) for i in range(len(plan.buckets)))
    return runs if isinstance(plan, Plan) else -(-runs // plan.windows)
