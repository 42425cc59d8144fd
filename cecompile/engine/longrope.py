"""longrope: rotary embeddings with one set of frequencies for short inputs and another for long inputs.

`transformers` chooses in every forward, by the longest input of the batch. Some versions wait for the device to do so,
which a captured graph cannot. All sequences of a pass are on one side of the boundary, so the choice comes before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cecompile.errors import UserError
from cecompile.model.support import boundary_of

_USED = ("inv_freq", "original_inv_freq", "config")  # of a rotary embedding


class Frequencies:
    """The frequencies that passes of a model on its device use; without longrope this does nothing.

    Attributes:
        boundary: tokens of the longest short input; None without longrope.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.boundary = boundary_of(model.config)
        self._long = False
        self._sets = (
            [] if self.boundary is None else [_Set(m, self.boundary) for m in model.modules() if _is_longrope(m)]
        )
        if self.boundary is not None and not self._sets:
            raise UserError(f"{type(model).__name__}: longrope: no frequencies found; --engine reference runs without")

    def choose(self, deepest: int) -> None:
        """Chooses for passes from now on, whose longest path has `deepest` + 1 tokens."""
        long = self.boundary is not None and deepest >= self.boundary
        if long != self._long:
            self._long = long
            for one in self._sets:
                one.now.copy_(one.long if long else one.short)

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """While this lasts, the model uses the chosen frequencies."""
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
        make = ROPE_INIT_FUNCTIONS["longrope"]
        self.long, _ = make(embedding.config, self.short.device, seq_len=boundary + 1)
        self.now = self.short.clone()


def _is_longrope(module: nn.Module) -> bool:
    return getattr(module, "rope_type", None) == "longrope" and all(hasattr(module, name) for name in _USED)
