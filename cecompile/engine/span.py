"""A part of a model: some of its decoder layers, within the stock forward.

A model that does not fit one device is run a few layers at a time. The model's own forward runs all the same, masks,
position embeddings and all; layers that are not there hand on what they are given, and the one before the first that
is there hands on the hidden states that another part has computed.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.engine.layers import decoder_layers, norms_beside
from cecompile.errors import UserError


@dataclass(frozen=True, slots=True)
class Share:
    """What of a model's weights is held: the decoder layers from `first` to before `last`, of `layers` in all, and
    all that lies beside the layers; but the input embedding only `with_embedding`, and the head only `with_head`."""

    first: int
    last: int
    layers: int
    with_embedding: bool = True
    with_head: bool = True

    def absent(self, model: PreTrainedModel) -> set[int]:
        """The `id`s of the parameters and buffers of a model that are not held."""
        layers = decoder_layers(model)
        if len(layers) != self.layers:
            raise ValueError(f"{self.layers} layers of a model of {len(layers)}")
        gone = layers[: self.first] + layers[self.last :]
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not self.with_embedding:
            gone.append(embedding)
        if not self.with_head and head is not None:
            gone.append(head)
        inside = {module for one in gone for module in one.modules()}
        kept = {id(t) for m in model.modules() if m not in inside for t in _own(m)}
        return {id(t) for m in inside for t in _own(m)} - kept


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


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
        held, places = _list_of(model, layers)
        self._before: _Standing | None = None
        self._after: _Standing | None = None
        for i, layer in enumerate(layers):
            if first <= i < last:
                continue
            held[places[i]] = standing = _Standing(layer, keeps=i == last)
            if i == first - 1:
                self._before = standing
            if i == last:
                self._after = standing
        dtype, size = model.dtype, model.get_input_embeddings().embedding_dim
        self._nothing = torch.zeros((), dtype=dtype, device=model.device)
        self._given = size

    @classmethod
    def of(cls, model: PreTrainedModel, share: Share) -> "Span":
        """The span of a share; the embedding and the head are taken out too where they are not held.

        Raises:
            UserError: see `Span`.
        """
        absent = share.absent(model)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and any(id(t) in absent for t in _own(module)):
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


class _Standing(nn.Module):
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


def _list_of(model: PreTrainedModel, layers: Sequence[nn.Module]) -> tuple[nn.ModuleList, list[int]]:
    """The list that holds the layers, and where in it each is."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(layers) and layers[0] in list(module):
            held = list(module)
            if all(layer in held for layer in layers):
                return module, [held.index(layer) for layer in layers]
    raise UserError(f"{type(model).__name__}: its layers are not in one list: cannot be run in parts")


class Stations:
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
        self._held, self._places = _list_of(model, self.layers)
        self._stations = [_Station(layer) for layer in self.layers]
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


class _Station(_Standing):
    """Stands where a decoder layer stood; hands on what it is given, unless it is `at_work`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, keeps=False)
        self.taken: Any = None
        self._layer: tuple[Callable[..., Any]] | None = None  # in a tuple it is no module of this one
        self._works = False

    @contextmanager
    def at_work(self, received: Tensor | None, layer: Callable[..., Any] | None) -> Iterator["_Station"]:
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
