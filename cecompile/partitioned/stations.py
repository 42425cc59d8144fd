"""The stock forward one layer at a time: given hidden states replace a layer's input, and its output is taken out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from cecompile.model.structure import decoder_layers, norms_beside
from cecompile.partitioned.span import PassThroughLayer, StockForward, open_at


class LayerwiseModel(StockForward):
    """The stock decoder with its layers replaced, so that one layer after another runs within the model's own forward.

    Outside of `open` the model is unchanged. `layers` are the model's own, in order; their weights are not used.

    Raises:
        UserError: see `StockForward`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, {})
        self.layers, self._norms = decoder_layers(model), norms_beside(model)
        self._stations = [PassThroughLayer(layer) for layer in self.layers]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Takes the layers out of the model within this context, where the methods below work."""
        for place, station in zip(self._places, self._stations, strict=True):
            self._list[place] = station
        try:
            yield
        finally:
            for place, layer in zip(self._places, self.layers, strict=True):
                self._list[place] = layer

    def begin(self, token_ids: Tensor, **arguments: Any) -> Tensor:
        """The first layer's input, (rows, length, width), for `token_ids`, (rows, length) int64.

        `arguments` are the decoder's, beside the tokens.

        Raises:
            UserError: the model's layers do not hand on hidden states alone.
        """
        return self._run(token_ids, None, None, self._stations[0], **arguments)

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
        station, calls = self._stations[place], [norm._compiled_call_impl for norm in self._norms]
        station.layer = (layer,)
        for norm in self._norms:  # nobody reads their output
            norm._compiled_call_impl = lambda hidden: hidden
        try:
            return self._run(token_ids, station, received, station, **arguments)
        finally:
            station.layer = None
            for norm, call in zip(self._norms, calls, strict=True):
                norm._compiled_call_impl = call

    def finish(self, token_ids: Tensor, received: Tensor, **arguments: Any) -> Tensor:
        """The model's last hidden states, (rows, length, width), from the last layer's output; see `step`."""
        return self._run(token_ids, self._stations[-1], received, None, **arguments)

    def logits(self, token_ids: Tensor, received: Tensor) -> Tensor:
        """The model's logits, (rows, length, vocabulary), from the last layer's output."""
        with open_at(self._stations[-1], received, None):
            return self._model(inputs_embeds=self._no_embeddings(token_ids), use_cache=False).logits
