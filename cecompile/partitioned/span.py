"""A part of a model: some of its decoder layers, run within the stock forward.

A model that does not fit one device runs a few layers at a time. The model's own forward still runs, with its masks and
position embeddings. Absent layers pass their input through. The absent layer before the first present one passes on the
hidden states that another part has computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.errors import UserError
from cecompile.model.structure import LayerRange, decoder_layers, own_tensors, returns_pair


class StockForward:
    """The stock decoder's own forward, with layers replaced where hidden states come in or are taken out.

    `replaced` gives, by index, the replacements of layers that leave the model for good. `width` is that of the hidden
    states between two layers.

    Raises:
        UserError: the model's layers are not in one list.
    """

    def __init__(self, model: PreTrainedModel, replaced: Mapping[int, "PassThroughLayer"]) -> None:
        self.width: int = model.config.get_text_config().hidden_size
        self._model = model
        self._list, self._places = _list_of(model, decoder_layers(model))
        for i, layer in replaced.items():
            self._list[self._places[i]] = layer
        self._zero = torch.zeros((), dtype=model.dtype, device=model.device)  # on the device of the layers that stay

    def _run(
        self, token_ids: Tensor, enter: "PassThroughLayer | None", received: Tensor | None,
        leave: "PassThroughLayer | None", **arguments: Any,
    ) -> Tensor:  # fmt: skip
        """The hidden states taken out behind the layer `leave`; with None, the decoder's last hidden states.

        Where there is a layer `enter`, `received` replaces the layer's input. `arguments` are the decoder's, beside the
        tokens. Raises UserError where the model's layers do not hand on hidden states alone.
        """
        given = {"input_ids": token_ids} if enter is None else {"inputs_embeds": self._no_embeddings(token_ids)}
        with open_at(enter, received, leave):
            hidden = self._model.base_model(**given, use_cache=False, **arguments).last_hidden_state
            return self._checked(hidden if leave is None else leave.taken, *token_ids.shape)

    def _no_embeddings(self, token_ids: Tensor) -> Tensor:
        """Embeddings that are all 0, for a forward in which nobody reads the embeddings."""
        return self._zero.expand(*token_ids.shape, self._model.get_input_embeddings().embedding_dim)

    def _checked(self, hidden: Any, *shape: int) -> Tensor:
        """Returns `hidden`, which must be hidden states of a shape that begins with `shape`; else raises UserError."""
        if not isinstance(hidden, Tensor) or hidden.shape[: len(shape)] != shape:
            name = type(self._model).__name__
            raise UserError(f"{name}: its layers do not hand on hidden states alone: cannot be run in parts")
        return hidden


class Span(StockForward):
    """The stock decoder with only the layers of a share; the others leave the model for good.

    The embedding and the head leave the model too, where the share lacks them. `begins` and `ends` are True where the
    model's first or last layer is in the span. All weights of the share are on the model's device.

    Raises:
        UserError: see `StockForward`.
    """

    def __init__(self, model: PreTrainedModel, share: LayerRange) -> None:
        absent, ends = share.absent(model), (model.get_input_embeddings(), model.get_output_embeddings())
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module in ends and any(id(t) in absent for t in own_tensors(module)):
                model.set_submodule(name, _Absent(module))
        self.begins, self.ends = share.first == 0, share.last == share.layers
        present, layers = range(share.first, share.last), enumerate(decoder_layers(model))
        replaced = {i: PassThroughLayer(layer) for i, layer in layers if i not in present}
        super().__init__(model, replaced)
        self._before, self._after = replaced.get(share.first - 1), replaced.get(share.last)

    def __call__(self, token_ids: Tensor, received: Tensor | None, **arguments: Any) -> Tensor:
        """The hidden states after these layers, (rows, length, width); where the span `ends`, after the last norm.

        Args:
            token_ids: (rows, length) int64.
            received: hidden states of the part before, (rows, length, width); unused where the span `begins`.
            arguments: of the decoder, beside the tokens.

        Raises:
            UserError: the model's layers do not hand on hidden states alone.
        """
        hidden = self._run(token_ids, self._before, received, self._after, **arguments)
        return self._checked(hidden, *token_ids.shape, self.width)


class PassThroughLayer(nn.Module):
    """Replaces a decoder layer: passes its input through, unless told otherwise.

    Attributes:
        instead: hidden states that replace the input; None leaves the input.
        layer: called with the hidden states; in a tuple, which makes the layer no submodule. None calls nothing.
        keeps: True keeps the result as `taken`.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():  # such as the kind of mask that the decoder is to pass
            if not name.startswith("_") and isinstance(value, str | int | float | None) and name != "training":
                setattr(self, name, value)
        self.instead: Tensor | None = None
        self.layer: tuple[Callable[..., Any]] | None = None
        self.keeps = False
        self.taken: Any = None
        self._returns_pair = returns_pair(layer)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        hidden = (*arguments, *named.values())[0]  # its name differs between architectures
        if self.instead is not None:
            hidden = self.instead
        if self.layer is not None:
            if arguments:
                arguments = (hidden, *arguments[1:])
            else:
                named[next(iter(named))] = hidden
            hidden = self.layer[0](*arguments, **named)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if self.keeps:
            self.taken = hidden
        return (hidden, None) if self._returns_pair else hidden


class _Absent(nn.Module):
    """Replaces an embedding or head that nobody calls; has the same width."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.embedding_dim = getattr(module, "embedding_dim", None)


def _list_of(model: PreTrainedModel, layers: Sequence[nn.Module]) -> tuple[nn.ModuleList, list[int]]:
    """The list that holds the layers, and each layer's index in the list."""
    for module in model.base_model.modules():
        held = list(module) if isinstance(module, nn.ModuleList) else []
        if layers and all(layer in held for layer in layers):
            return module, [held.index(layer) for layer in layers]
    raise UserError(f"{type(model).__name__}: its layers are not in one list: cannot be run in parts")


@contextmanager
def open_at(enter: PassThroughLayer | None, received: Tensor | None, leave: PassThroughLayer | None) -> Iterator[None]:
    """Replaces the input of the layer `enter` by `received`, and lets `leave` keep its result, within this context."""
    if enter is not None:
        enter.instead = received
    if leave is not None:
        leave.keeps = True
    try:
        yield
    finally:
        if enter is not None:
            enter.instead = None
        if leave is not None:
            leave.keeps, leave.taken = False, None
