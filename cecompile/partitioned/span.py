"""A part of a model: some of its decoder layers, within the stock forward.

A model that does not fit one device is run a few layers at a time. The model's own forward runs all the same, masks,
position embeddings and all; layers that are not there hand on what they are given, and the one before the first that
is there hands on the hidden states that another part has computed.
"""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.errors import UserError
from cecompile.model.structure import LayerRange, decoder_layers, own_tensors


class Span:
    """The stock decoder, of which only the layers from `first` to before `last` are there.

    The others are taken out of the model for good.

    Args:
        model: with the weights of these layers and of what is beside the layers on its device.
        first, last: indices of decoder layers.

    Attributes:
        begins, ends: whether the first and the last layer of the model are part of this.
        width: of the hidden states that are handed on.

    Raises:
        UserError: this model's layers are not in one list.
    """

    def __init__(self, model: PreTrainedModel, first: int, last: int) -> None:
        layers = decoder_layers(model)
        self.begins, self.ends = first == 0, last == len(layers)
        self.width: int = model.config.get_text_config().hidden_size
        self._body = model.base_model
        self._name = type(model).__name__
        held, places = list_of(model, layers)
        self._before: PassThroughLayer | None = None
        self._after: PassThroughLayer | None = None
        for i, layer in enumerate(layers):
            if first <= i < last:
                continue
            held[places[i]] = standing = PassThroughLayer(layer, keeps=i == last)
            if i == first - 1:
                self._before = standing
            if i == last:
                self._after = standing
        dtype, size = model.dtype, model.get_input_embeddings().embedding_dim
        self._nothing = torch.zeros((), dtype=dtype, device=model.device)
        self._given = size

    @classmethod
    def of(cls, model: PreTrainedModel, share: LayerRange) -> "Span":
        """The span of a share; the embedding and the head are taken out too where they are not held.

        Raises:
            UserError: see `Span`.
        """
        absent = share.absent(model)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and any(id(t) in absent for t in own_tensors(module)):
                _put(model, module, _Absent(module))
        return cls(model, share.first, share.last)

    def __call__(self, token_ids: Tensor, received: Tensor | None, **arguments: Any) -> Tensor:
        """The hidden states after these layers, (rows, length, width); after the model's last norm where it `ends`.

        Args:
            token_ids: (rows, length) int64.
            received: (rows, length, width), after the layers before; None where this `begins`.
            arguments: what else the decoder is called with.

        Raises:
            UserError: this model's layers do not hand on hidden states alone.
        """
        given: dict[str, Tensor]
        if self._before is None:
            given = {"input_ids": token_ids}
        else:
            self._before.instead = received
            given = {"inputs_embeds": self._nothing.expand(*token_ids.shape, self._given)}
        try:
            out = self._body(**given, use_cache=False, **arguments).last_hidden_state
        finally:
            if self._before is not None:
                self._before.instead = None
        if self._after is None:
            hidden = out
        else:
            hidden, self._after.given = self._after.given, None
        if not isinstance(hidden, Tensor) or hidden.shape != (*token_ids.shape, self.width):
            raise UserError(f"{self._name}: its layers do not hand on hidden states alone: cannot be run in parts")
        return hidden


class PassThroughLayer(nn.Module):
    """Stands where a decoder layer stood, and hands on what it is given, or what is there `instead`."""

    def __init__(self, layer: nn.Module, keeps: bool) -> None:
        super().__init__()
        self.instead: Tensor | None = None
        self.given: Any = None
        self._keeps = keeps
        self._more = _hands_on_more(layer)
        plain = (str, int, float, bool, type(None))
        for name, value in vars(layer).items():  # such as what kind of mask the decoder is to give it
            if not name.startswith("_") and isinstance(value, plain) and name != "training":
                setattr(self, name, value)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        hidden_states = (*arguments, *named.values())[0]  # by whatever name
        if self._keeps:
            self.given = hidden_states
        handed_on = hidden_states if self.instead is None else self.instead
        return (handed_on, None) if self._more else handed_on


class _Absent(nn.Module):
    """Stands where the embedding or the head stood, which nobody calls; of the same width."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.embedding_dim = getattr(module, "embedding_dim", None)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _hands_on_more(layer: nn.Module) -> bool:
    """Whether a layer returns a pair, of hidden states and attention weights, as its code says."""
    code = ast.parse(textwrap.dedent(inspect.getsource(type(layer).forward)))
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(code))


def list_of(model: PreTrainedModel, layers: Sequence[nn.Module]) -> tuple[nn.ModuleList, list[int]]:
    """The list that holds the layers, and where in it each is."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(layers) and layers[0] in list(module):
            held = list(module)
            if all(layer in held for layer in layers):
                return module, [held.index(layer) for layer in layers]
    raise UserError(f"{type(model).__name__}: its layers are not in one list: cannot be run in parts")
