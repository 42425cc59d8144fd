"""The stock forward one layer at a time: given hidden states replace a layer's input, and its output is taken out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from cecompile.model.structure import decoder_layers, norms_beside
from cecompile.partitioned.span import PassThroughLayer, checked, list_of, no_embeddings


class LayerwiseModel:
    """The stock decoder with its layers replaced, so that one layer after another runs within the model's own forward.

    Outside of `open` the model is unchanged. All weights but the layers' are on the model's device.

    Attributes:
        layers: the model's own, in order; their weights are not used.
        width: of the hidden states.

    Raises:
        UserError: the model's layers are not in one list.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = decoder_layers(model)
        self.width: int = model.config.get_text_config().hidden_size
        self._model = model
        self._norms = norms_beside(model)
        self._held, self._places = list_of(model, self.layers)
        self._stations = [PassThroughLayer(layer) for layer in self.layers]
        self._no_embeddings = no_embeddings(model)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within this context, the layers are out of the model, and the methods below work."""
        for place, station in zip(self._places, self._stations, strict=True):
            self._held[place] = station
        try:
            yield
        finally:
            for place, layer in zip(self._places, self.layers, strict=True):
                self._held[place] = layer

    def begin(self, token_ids: Tensor, **arguments: Any) -> Tensor:
        """The first layer's input, (rows, length, width), for `token_ids`, (rows, length) int64.

        `arguments` are the decoder's, beside the tokens.

        Raises:
            UserError: the model's layers do not hand on hidden states alone.
        """
        with _at_work(self._stations[0]) as station:
            self._model.base_model(input_ids=token_ids, use_cache=False, **arguments)
            return self._checked(station.taken, token_ids)

    def step(
        self, place: int, layer: Callable[..., Any], token_ids: Tensor, received: Tensor, **arguments: Any
    ) -> Tensor:
        """The output of `layer`, (rows, length, width), run in place of the model's layer of index `place`.

        Args:
            place: decides the decoder's arguments to the layer beside the hidden states.
            layer: called like the model's own layer.
            token_ids, arguments: see `begin`.
            received: (rows, length, width), which the layer may overwrite.

        Raises:
            UserError: see `begin`.
        """
        calls = [norm._compiled_call_impl for norm in self._norms]
        for norm in self._norms:  # nobody reads their output
            norm._compiled_call_impl = _same
        try:
            with _at_work(self._stations[place], received, layer) as station:
                self._model.base_model(inputs_embeds=self._no_embeddings(token_ids), use_cache=False, **arguments)
                return self._checked(station.taken, token_ids)
        finally:
            for norm, call in zip(self._norms, calls, strict=True):
                norm._compiled_call_impl = call

    def finish(self, token_ids: Tensor, received: Tensor, **arguments: Any) -> Tensor:
        """The model's last hidden states, (rows, length, width), from the last layer's output; see `step`."""
        given = {"inputs_embeds": self._no_embeddings(token_ids), **arguments}
        with _at_work(self._stations[-1], received):
            return self._checked(self._model.base_model(**given, use_cache=False).last_hidden_state, token_ids)

    def logits(self, token_ids: Tensor, received: Tensor) -> Tensor:
        """The model's logits, (rows, length, vocabulary), from the last layer's output."""
        with _at_work(self._stations[-1], received):
            logits: Tensor = self._model(inputs_embeds=self._no_embeddings(token_ids), use_cache=False).logits
            return logits

    def _checked(self, hidden: Any, token_ids: Tensor) -> Tensor:
        return checked(hidden, token_ids.shape, type(self._model).__name__)


def _same(hidden: Tensor) -> Tensor:
    return hidden


@contextmanager
def _at_work(
    station: PassThroughLayer, received: Tensor | None = None, layer: Callable[..., Any] | None = None
) -> Iterator[PassThroughLayer]:
    """Within this context, the station takes `received` as its input, calls `layer`, and keeps the result."""
    station.instead, station.layer, station.keeps = received, None if layer is None else (layer,), True
    try:
        yield station
    finally:
        station.instead, station.layer, station.keeps, station.taken = None, None, False, None
