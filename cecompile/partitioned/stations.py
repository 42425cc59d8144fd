"""The stock forward one layer at a time: hidden states are put in where a layer stood, and taken out behind it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.errors import UserError
from cecompile.model.structure import decoder_layers, norms_beside
from cecompile.partitioned.span import PassThroughLayer, list_of


class LayerwiseModel:
    """The stock decoder without its layers: hidden states are put in where a layer stood, and taken out behind it.

    So one layer after another can run within the model's own forward. While nothing runs, the model is as it was.

    Args:
        model: with the weights of what is beside the layers on its device.

    Attributes:
        layers: the model's, in order; what they hold is not used.
        width: of the hidden states.

    Raises:
        UserError: this model's layers are not in one list.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = decoder_layers(model)
        self.width: int = model.config.get_text_config().hidden_size
        self._model = model
        self._norms = norms_beside(model)
        self._held, self._places = list_of(model, self.layers)
        self._stations = [_LayerStation(layer) for layer in self.layers]
        self._nothing = torch.zeros((), dtype=model.dtype, device=model.device)
        self._given = model.get_input_embeddings().embedding_dim

    @contextmanager
    def open(self) -> Iterator[None]:
        """While this lasts, the layers are out of the model, and the methods below work."""
        for place, station in zip(self._places, self._stations, strict=True):
            self._held[place] = station
        try:
            yield
        finally:
            for place, layer in zip(self._places, self.layers, strict=True):
                self._held[place] = layer

    def begin(self, token_ids: Tensor, **arguments: Any) -> Tensor:
        """What the first layer is given, (rows, length, width).

        Args:
            token_ids: (rows, length) int64.
            arguments: what else the decoder is called with.

        Raises:
            UserError: this model's layers do not hand on hidden states alone.
        """
        with self._stations[0].at_work(None, None) as station:
            self._model.base_model(input_ids=token_ids, use_cache=False, **arguments)
            return self._checked(station.taken, token_ids)

    def step(
        self, place: int, layer: Callable[..., Any], token_ids: Tensor, received: Tensor, **arguments: Any
    ) -> Tensor:
        """What `layer` makes of hidden states, run where the layer of index `place` stood: (rows, length, width).

        Args:
            place: decides what the decoder gives the layer beside the hidden states.
            layer: as that one is called.
            token_ids, arguments: see `begin`.
            received: (rows, length, width), which the layer may overwrite.

        Raises:
            UserError: see `begin`.
        """
        calls = [norm._compiled_call_impl for norm in self._norms]
        for norm in self._norms:  # nobody looks at what is behind the layer
            norm._compiled_call_impl = _same
        try:
            with self._stations[place].at_work(received, layer) as station:
                self._model.base_model(inputs_embeds=self._of(token_ids), use_cache=False, **arguments)
                return self._checked(station.taken, token_ids)
        finally:
            for norm, call in zip(self._norms, calls, strict=True):
                norm._compiled_call_impl = call

    def finish(self, token_ids: Tensor, received: Tensor, **arguments: Any) -> Tensor:
        """The model's last hidden states, (rows, length, width), from those behind the last layer; see `step`."""
        with self._stations[-1].at_work(received, None):
            hidden = self._model.base_model(inputs_embeds=self._of(token_ids), use_cache=False, **arguments)
            return self._checked(hidden.last_hidden_state, token_ids)

    def logits(self, token_ids: Tensor, received: Tensor) -> Tensor:
        """The model's logits, (rows, length, vocabulary), from the hidden states behind the last layer."""
        with self._stations[-1].at_work(received, None):
            logits: Tensor = self._model(inputs_embeds=self._of(token_ids), use_cache=False).logits
            return logits

    def _of(self, token_ids: Tensor) -> Tensor:
        return self._nothing.expand(*token_ids.shape, self._given)

    def _checked(self, hidden: Any, token_ids: Tensor) -> Tensor:
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != token_ids.shape:
            name = type(self._model).__name__
            raise UserError(f"{name}: its layers do not hand on hidden states alone: cannot be run one by one")
        return hidden


def _same(hidden: Tensor) -> Tensor:
    return hidden


class _LayerStation(PassThroughLayer):
    """Stands where a decoder layer stood; hands on what it is given, unless it is `at_work`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, keeps=False)
        self.taken: Any = None
        self._layer: tuple[Callable[..., Any]] | None = None  # in a tuple it is no module of this one
        self._works = False

    @contextmanager
    def at_work(self, received: Tensor | None, layer: Callable[..., Any] | None) -> Iterator["_LayerStation"]:
        """While this lasts: takes hidden states, those `received` where there are any; calls `layer`, where there is
        one; and keeps the result as `taken`."""
        self.instead, self._layer, self._works = received, None if layer is None else (layer,), True
        try:
            yield self
        finally:
            self.instead = self.taken = self._layer = None
            self._works = False

    def forward(self, *arguments: Any, **named: Any) -> Any:
        hidden_states = (*arguments, *named.values())[0]  # by whatever name
        if self._works:
            if self.instead is not None:
                hidden_states = self.instead
            if self._layer is not None:
                if arguments:
                    arguments = (hidden_states, *arguments[1:])
                else:
                    named[next(iter(named))] = hidden_states
                hidden_states = self._layer[0](*arguments, **named)
                hidden_states = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
            self.taken = hidden_states
        return (hidden_states, None) if self._more else hidden_states
