"""longrope: rotary embeddings with one set of frequencies for short inputs and another for long inputs.

`transformers` chooses the set in every forward, by the longest input of the batch. Some versions then wait for the
device, which a captured graph cannot. Here all sequences of a pass use one set, so the set is chosen before the pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cecompile.errors import UserError
from cecompile.model.support import boundary_of

_USED = ("inv_freq", "original_inv_freq", "config")  # of a rotary embedding


class Frequencies:
    """The frequencies that the passes of a model use. Without longrope all methods do nothing.

    `boundary` is the tokens of the longest short input; None without longrope.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.boundary = boundary_of(model.config)
        self._long = False
        of_kind = [m for m in model.modules() if getattr(m, "rope_type", None) == "longrope"]
        found = [m for m in of_kind if all(hasattr(m, name) for name in _USED)]
        self._sets = [] if self.boundary is None else [_Set(m, self.boundary) for m in found]
        if self.boundary is not None and not found:
            raise UserError(f"{type(model).__name__}: longrope: no frequencies found; --engine reference runs without")

    def choose(self, deepest: int) -> None:
        """Chooses the frequencies of all later passes, whose longest path has `deepest` + 1 tokens."""
        long = self.boundary is not None and deepest >= self.boundary
        if long != self._long:
            self._long = long
            for one in self._sets:
                one.now.copy_(one.long if long else one.short)

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Makes the model use the chosen frequencies, within this context."""
        before = [one.embedding.inv_freq for one in self._sets]
        for one in self._sets:
            one.embedding.inv_freq, one.embedding.rope_type = one.now, "default"
        try:
            yield
        finally:
            for one, inv_freq in zip(self._sets, before, strict=True):
                one.embedding.inv_freq, one.embedding.rope_type = inv_freq, "longrope"


class _Set:
    """One embedding's frequencies, and the buffer `now` that passes read."""

    def __init__(self, embedding: Any, boundary: int) -> None:
        self.embedding = embedding
        self.short = embedding.original_inv_freq.to(embedding.inv_freq.device)
        self.long, _ = ROPE_INIT_FUNCTIONS["longrope"](embedding.config, self.short.device, seq_len=boundary + 1)
        self.now = self.short.clone()
