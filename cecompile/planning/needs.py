"""The needs of a run: the bytes that a model takes with buckets of a given shape, as a whole or stage by stage."""

from dataclasses import replace
from typing import Any

from cecompile.model.structure import LayerRange
from cecompile.planning import memory
from cecompile.planning.options import RunOptions
from cecompile.planning.sizes import Sizes, Streamed, model_sizes, streamed_sizes
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Geometry


class Needs:
    """Counts the bytes that one model needs.

    Args:
        config: the model's configuration.
        kind: "cpu" or "cuda".
        dtype: "auto" or a torch dtype's name.
        options: of the run.

    Attributes:
        shares: the layers of each stage, once the layers are divided; empty where one device has all layers.
        streamed: the streamed layers' sizes; None where all weights are in memory.

    Raises:
        UserError: the weights are to be streamed, but this model's layers cannot be streamed.
    """

    def __init__(self, config: Any, kind: str, dtype: str, options: RunOptions) -> None:
        self.shares: tuple[LayerRange, ...] = ()
        self._config, self._kind, self._dtype = config, kind, dtype
        self._sizes: dict[LayerRange | None, Sizes] = {}
        self.streamed: Streamed | None = None
        if options.stream_weights:
            self.streamed = streamed_sizes(config, self.model_sizes().itemsize)

    def model_sizes(self, share: LayerRange | None = None) -> Sizes:
        """The sizes of the model, or of a share of the model, that decide memory and cost."""
        if share not in self._sizes:
            self._sizes[share] = model_sizes(self._config, self._dtype, share)
        return self._sizes[share]

    def budget(
        self, geometry: Geometry, engine: str, decoding: DecodeShape | None = None, passes: int = 1
    ) -> memory.Budget:
        """The budget of a run with this geometry; of several stages, of the stage that needs most.

        Args:
            geometry: the largest bucket's.
            engine: "compiled" or "eager".
            decoding: the decoder's shape, where answers are decoded.
            passes: under way at once, where layers are streamed.
        """
        return max(self.budgets(geometry, engine, decoding, passes), key=lambda one: one.total)

    def budgets(
        self, geometry: Geometry, engine: str, decoding: DecodeShape | None = None, passes: int = 1
    ) -> list[memory.Budget]:
        """The budget of each stage; see `budget`."""
        streamed, shares = self.streamed, self.shares or (None,)
        if streamed is not None:
            shares = (LayerRange(0, 0, streamed.layers),)
            streamed = replace(streamed, passes=passes)
        sizes = [self.model_sizes(share) for share in shares]
        return [memory.budget(one, geometry, self._kind, engine, decoding, streamed) for one in sizes]

    def passes_at_once(self, geometry: Geometry, engine: str, passes: int, room: int) -> int:
        """How many of `passes` go through a streamed layer at once: as many as `room` bytes hold, in equal sweeps."""
        one, two = (self.budget(geometry, engine, None, n) for n in (1, 2))
        most = max(1, 1 + (room - one.total) // (two.hidden - one.hidden))
        return -(-passes // -(-passes // most))
