"""longrope: rotary embeddings with one set of frequencies for short inputs and another for long ones.

`transformers` chooses in every forward, for the whole batch, by its longest input; some versions wait for the device to
say which, and what waits cannot be captured. All sequences of a pass here are on one side of the boundary, so the
choice is made before the pass.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cecompile.errors import UserError
from cecompile.model.support import boundary_of

_USED = ("inv_freq", "original_inv_freq", "config")  # of a rotary embedding


class Frequencies:
    """The frequencies that a model's passes use; of a model without longrope, nothing.

    Args:
        model: on its device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.boundary = boundary_of(model.config)
        self._long = False
        self._sets = [] if self.boundary is None else [_Set(m, self.boundary) for m in _embeddings(model)]
        if self.boundary is not None and not self._sets:
            raise UserError(f"{type(model).__name__}: longrope: no frequencies found; --engine reference runs without")

    def choose(self, deepest: int) -> None:
        """For passes from now on, of which the longest path has `deepest` + 1 tokens."""
        long = self.boundary is not None and deepest >= self.boundary
        if long != self._long:
            self._long = long
            for one in self._sets:
                one.now.copy_(one.long if long else one.short)

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """While this lasts, the model uses what was chosen, and does not choose."""
        with ExitStack() as stack:
            for one in self._sets:
                stack.enter_context(one.fixed())
            yield


class _Set:
    """One embedding's frequencies, and the buffer that passes read them from."""

    def __init__(self, embedding: Any, boundary: int) -> None:
        self._embedding = embedding
        self.short = embedding.original_inv_freq.to(embedding.inv_freq.device)
        make = ROPE_INIT_FUNCTIONS["longrope"]
        self.long, _ = make(embedding.config, self.short.device, seq_len=boundary + 1)
        self.now = self.short.clone()

    @contextmanager
    def fixed(self) -> Iterator[None]:
        before = self._embedding.inv_freq
        self._embedding.inv_freq, self._embedding.rope_type = self.now, "default"
        try:
            yield
        finally:
            self._embedding.inv_freq, self._embedding.rope_type = before, "longrope"


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    return [
        m
        for m in model.modules()
        if getattr(m, "rope_type", None) == "longrope" and all(hasattr(m, name) for name in _USED)
    ]
