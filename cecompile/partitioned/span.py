"""A part of a model: some of its decoder layers, run within the stock forward.

A model that does not fit one device runs a few layers at a time. The model's own forward still runs, with its masks and
position embeddings. Absent layers pass their input through. The absent layer before the first present one passes on the
hidden states that another part has computed.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.errors import UserError
from cecompile.model.structure import LayerRange, decoder_layers, own_tensors


class Span:
    """The stock decoder with only the layers from `first` to before `last`; the others leave the model for good.

    Args:
        model: has the weights of these layers, and all weights outside of layers, on its device.
        first, last: indices of decoder layers.

    Attributes:
        begins, ends: True where the model's first or last layer is in this span.
        width: of the hidden states between two parts.

    Raises:
        UserError: the model's layers are not in one list.
    """

    def __init__(self, model: PreTrainedModel, first: int, last: int) -> None:
        layers = decoder_layers(model)
        self.begins, self.ends = first == 0, last == len(layers)
        self.width: int = model.config.get_text_config().hidden_size
        self._body, self._name = model.base_model, type(model).__name__
        held, places = list_of(model, layers)
        absent = {i: PassThroughLayer(layer) for i, layer in enumerate(layers) if not first <= i < last}
        for i, layer in absent.items():
            held[places[i]] = layer
        self._no_embeddings = no_embeddings(model)  # on the device of what is left
        self._before, self._after = absent.get(first - 1), absent.get(last)
        if self._after is not None:
            self._after.keeps = True

    @classmethod
    def of(cls, model: PreTrainedModel, share: LayerRange) -> "Span":
        """The span of a share. The embedding and the head leave the model too, where the share lacks them.

        Raises:
            UserError: see `Span`.
        """
        absent, ends = share.absent(model), (model.get_input_embeddings(), model.get_output_embeddings())
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module in ends and any(id(t) in absent for t in own_tensors(module)):
                model.set_submodule(name, _Absent(module))
        return cls(model, share.first, share.last)

    def __call__(self, token_ids: Tensor, received: Tensor | None, **arguments: Any) -> Tensor:
        """The hidden states after these layers, (rows, length, width); where the span `ends`, after the last norm.

        Args:
            token_ids: (rows, length) int64.
            received: hidden states of the part before, (rows, length, width); unused where the span `begins`.
            arguments: of the decoder, beside the tokens.

        Raises:
            UserError: the model's layers do not hand on hidden states alone.
        """
        given = {"input_ids": token_ids}
        if self._before is not None:
            self._before.instead = received
            given = {"inputs_embeds": self._no_embeddings(token_ids)}
        try:
            hidden = self._body(**given, use_cache=False, **arguments).last_hidden_state
        finally:
            if self._before is not None:
                self._before.instead = None
        if self._after is not None:
            hidden, self._after.taken = self._after.taken, None
        return checked(hidden, (*token_ids.shape, self.width), self._name)


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
        self._returns_pair = _returns_pair(layer)

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


def _returns_pair(layer: nn.Module) -> bool:
    """Whether a layer's code returns a pair: hidden states and attention weights."""
    code = ast.parse(textwrap.dedent(inspect.getsource(type(layer).forward)))
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(code))


def list_of(model: PreTrainedModel, layers: Sequence[nn.Module]) -> tuple[nn.ModuleList, list[int]]:
    """The list that holds the layers, and each layer's index in it."""
    for module in model.base_model.modules():
        held = list(module) if isinstance(module, nn.ModuleList) else []
        if layers and all(layer in held for layer in layers):
            return module, [held.index(layer) for layer in layers]
    raise UserError(f"{type(model).__name__}: its layers are not in one list: cannot be run in parts")


def no_embeddings(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """A function from token ids to embeddings that are all 0, for a forward in which nobody reads the embeddings."""
    zero = torch.zeros((), dtype=model.dtype, device=model.device)
    size = model.get_input_embeddings().embedding_dim
    return lambda token_ids: zero.expand(*token_ids.shape, size)


def checked(hidden: Any, shape: Sequence[int], name: str) -> Tensor:
    """Returns `hidden`, which must be hidden states of a shape that begins with `shape`.

    Raises:
        UserError: `hidden` is anything else; the message names the model.
    """
    if not isinstance(hidden, Tensor) or hidden.shape[: len(shape)] != tuple(shape):
        raise UserError(f"{name}: its layers do not hand on hidden states alone: cannot be run in parts")
    return hidden
