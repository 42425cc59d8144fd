"""Greedy decoding of many rows at once: the static pass with a key-value cache.

All rows in flight share one cache of `shape.slots` token slots in every layer. Each row has a segment of the cache. A
step reads a few tokens, each with its slot and its position. A token sees the tokens with which all rows begin, which
are in the first slots, and its segment up to itself. So one fixed shape serves any mix of prompts and answers, whatever
their lengths. A step reads the keys and values of the whole cache once, not once per row.

Where no CUDA graph is captured, a step is no larger than its tokens, reads only the slots in use, and runs uncompiled:
on a CPU, compiled steps took as long as uncompiled ones, and padding took most of the time.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from cecompile.device import is_out_of_memory
from cecompile.engine.attention import Masks, dense, reaching
from cecompile.engine.cuda_graph import capture
from cecompile.engine.head import Readout
from cecompile.engine.longrope import Frequencies
from cecompile.engine.parts import one_layer_of_each_kind
from cecompile.errors import first_line
from cecompile.model.structure import decoder_layers
from cecompile.workload.decode_schedule import DecodeShape, Step

_Place = int | str  # of an argument in a call: its number or its name
_Size = tuple[int, int]  # heads, head size


class NotDecodableError(Exception):
    """This model's layers take no key-value cache of the form used here; the message says why."""


class Decoder:
    """A model ready to read and write a token at a time.

    Args:
        model: with our attention installed.
        readout: of the model's head, see `head.readout_of`.
        shape, rope: the shape of the cache and of its steps, and the model's rotary frequencies.
        pool: memory pool for a CUDA graph of each size of step; None captures no graph, and runs layers uncompiled.

    Raises:
        NotDecodableError: the model's layers take no key-value cache of the form used here.
    """

    def __init__(
        self, model: PreTrainedModel, readout: Readout, shape: DecodeShape, pool: Any, rope: Frequencies
    ) -> None:  # fmt: skip
        if max(shape.step_tokens) >= shape.slots:
            raise ValueError(f"a cache of {shape.slots} slots does not hold a step of {max(shape.step_tokens)} tokens")
        self.shape = shape
        self._model, self._layers = model, decoder_layers(model)
        self._readout, self._rope = readout, rope
        self._pool = pool
        self._clear: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            found = _probe(model, self._layers)
            self._places = [place for place, _ in found]
            self._caches = self._allocate([sizes for _, sizes in found])
            sizes = () if pool is None else shape.step_tokens
            self._steps = [_StepBuffers(size, shape, model.device) for size in sizes]

    @torch.inference_mode()
    def warm_up(self, done: Callable[[int], None] = lambda _: None) -> None:
        """Compiles and captures every size of step, largest first, or tries whether memory holds the step.

        `done` is called after each.
        """
        for step in self._steps:
            step.graph = capture(functools.partial(self._fill, step), self._pool)
            done(step.size)
        for size in self.shape.step_tokens[len(self._steps) :]:
            slot, zero = np.arange(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
            read = zero[: self.shape.lanes]
            with one_layer_of_each_kind(self._model):
                self._exactly(Step(zero, slot, zero, read, read, zero[:1]), self.shape.slots)
            done(size)

    def clear(self) -> None:
        """Empties the cache. Due whenever the model has run passes: captured passes use the cache's memory."""
        if self._clear is not None:
            self._clear.replay()

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Reads the step's tokens into the cache.

        Returns:
            Per token in `step.read`, (n,) each: its target's log-probability (natural), and the most likely token.
        """
        self._rope.choose(0)
        buffers = next((b for b in reversed(self._steps) if b.size >= len(step.token_ids)), None)
        if buffers is None:
            outputs = self._exactly(step, int(step.slot.max()) + 2)  # fewer tokens than slots, see `DecodeShape`
        else:
            buffers.load(step)
            assert buffers.graph is not None
            buffers.graph.replay()
            outputs = (buffers.logprob, buffers.argmax)
        logprob, argmax = (t[: len(step.read)].to("cpu", copy=True).numpy() for t in outputs)
        return logprob, argmax

    def _allocate(self, sizes: Sequence[tuple[_Size, _Size]]) -> list["_LayerCache"]:
        """Every layer's cache, filled with zeros: unseen values are multiplied by 0, and must be numbers.

        With a pool the cache takes the memory of the captured passes' activations, which lie idle during decoding.
        """
        with ExitStack() as stack:
            if self._pool is not None:
                self._clear = torch.cuda.CUDAGraph()
                stack.enter_context(torch.cuda.graph(self._clear, pool=self._pool))
            caches = [_LayerCache(self.shape.slots, *size, self._model) for size in sizes]
        self.clear()
        return caches

    def _fill(self, step: "_StepBuffers") -> None:
        """Runs the step in the static buffers, and fills its outputs."""
        logprob, argmax = self._forward(step.part, self.shape.slots)
        step.logprob.copy_(logprob)
        step.argmax.copy_(argmax)

    def _exactly(self, step: Step, used: int) -> tuple[Tensor, Tensor]:
        """Runs a step of just these tokens over the first `used` slots, uncompiled; see `_forward`."""
        part = {f: torch.from_numpy(getattr(step, f)).to(self._model.device) for f in Step.__slots__}
        with torch.compiler.set_stance("force_eager"):
            return self._forward(part, used)

    def _forward(self, part: Mapping[str, Tensor], used: int) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the targets and the most likely tokens, (n,) each, over the first `used` slots."""
        masks = _StepMasks(part, used)
        with masks.active(), self._rope.fixed(), self._caching(part["slot"], used):
            ids, position_ids = part["token_ids"].long()[None], (part["slot"] - part["first"]).long()[None]
            arguments = {"input_ids": ids, "position_ids": position_ids, **masks.arguments(self._model)}
            hidden = self._model.base_model(use_cache=False, **arguments).last_hidden_state
        if not len(part["read"]):
            return part["read"].float(), part["read"]
        chosen = hidden[0].index_select(0, part["read"])
        logprob, argmax = self._readout(chosen, part["target"][:, None])
        return logprob[:, 0], argmax

    @contextmanager
    def _caching(self, slot: Tensor, used: int) -> Iterator[None]:
        """Makes every decoder layer run with the first `used` slots of its own cache, within this context."""
        slots = slot.long()
        calls = [layer._compiled_call_impl for layer in self._layers]
        for layer, place, cache, call in zip(self._layers, self._places, self._caches, calls, strict=True):
            cache.slots, cache.used = slots, used
            layer._compiled_call_impl = functools.partial(_with_cache, call or layer._call_impl, place, cache)
        try:
            yield
        finally:
            for layer, call in zip(self._layers, calls, strict=True):
                layer._compiled_call_impl = call


class _LayerCache:
    """One layer's keys and values, with the method by which a layer adds to its cache."""

    def __init__(self, slots: int, key: _Size, value: _Size, model: PreTrainedModel) -> None:
        (heads, size), (value_heads, value_size) = key, value
        self.keys = torch.zeros(1, heads, slots, size, dtype=model.dtype, device=model.device)
        self.values = torch.zeros(1, value_heads, slots, value_size, dtype=model.dtype, device=model.device)
        self.slots = torch.zeros(0, dtype=torch.long, device=model.device)
        self.used = slots

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes (1, heads, tokens, head size) at the step's slots; returns the slots in use."""
        self.keys.index_copy_(2, self.slots, key)
        self.values.index_copy_(2, self.slots, value)
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]


class _StepMasks(Masks):
    """The masks of a step: a token sees what all rows share, and its segment up to itself. `part`: see `Step`."""

    def __init__(self, part: Mapping[str, Tensor], slots: int) -> None:
        self._part, self._slots = part, slots

    def get(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask, (1, 1, tokens, slots): 0 where visible, else minus infinity."""
        slot, first, shared = self._part["slot"][:, None], self._part["first"][:, None], self._part["shared"]
        key = torch.arange(self._slots, device=slot.device, dtype=slot.dtype)
        of_all, own = key < shared, key >= first + shared
        visible = (of_all | own) & (key <= slot)
        window = reaching(window, self._slots)
        if window is not None:
            visible &= slot - torch.where(of_all, first + key, key) < window
        return dense(visible[None], dtype)


class _StepBuffers:
    """The static buffers of one size of step, and the step's graph once captured."""

    def __init__(self, size: int, shape: DecodeShape, device: torch.device) -> None:
        self.size = size
        self.graph: torch.cuda.CUDAGraph | None = None
        lengths = {"token_ids": size, "slot": size, "first": size, "read": shape.lanes, "target": shape.lanes}
        lengths["shared"] = 1
        self._unused = dict.fromkeys(lengths, 0) | dict.fromkeys(("slot", "first"), shape.slots - 1)
        self._host = torch.zeros(sum(lengths.values()), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._data = self._host.to(device, copy=True)
        sizes = list(lengths.values())
        self.part = dict(zip(lengths, self._data.split(sizes), strict=True))
        self._given = {name: t.numpy() for name, t in zip(lengths, self._host.split(sizes), strict=True)}
        self.logprob = torch.zeros(shape.lanes, dtype=torch.float32, device=device)
        self.argmax = torch.zeros(shape.lanes, dtype=torch.int32, device=device)

    def load(self, step: Step) -> None:
        """Copies a step into the static buffers. Unused entries write to the last slot, which no row sees."""
        for name, unused in self._unused.items():
            values = getattr(step, name)
            self._given[name][: len(values)] = values
            self._given[name][len(values) :] = unused
        self._data.copy_(self._host)  # not `non_blocking`: the next `load` may come before the device has read this one


def _with_cache(call: Callable[..., Any], place: _Place, cache: _LayerCache, /, *args: Any, **kwargs: Any) -> Any:
    """Calls a layer with `cache` as its key-value cache."""
    args, kwargs = _put(cache, place, args, kwargs)
    return call(*args, **kwargs)


def _put(value: Any, place: _Place, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A call's arguments with `value` at `place`."""
    if isinstance(place, str):
        return args, kwargs | {place: value}
    return (*args[:place], value, *args[place + 1 :]), kwargs


class _Recorder:
    """Replaces a layer's cache; notes the cache's place among the arguments, and the sizes that the layer adds."""

    def __init__(self) -> None:
        self.places: list[_Place] = []
        self.sizes: list[tuple[_Size, _Size]] = []

    def replace(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Replaces the cache in a layer's arguments, as a pre-hook. Names of arguments differ, so all are looked at."""
        given: dict[_Place, Any] = {**dict(enumerate(args)), **kwargs}
        for place, value in given.items():
            if isinstance(value, Cache):
                self.places.append(place)
                args, kwargs = _put(self, place, args, kwargs)
        return args, kwargs

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Notes heads and head size of keys and of values."""
        self.sizes.append(((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])))
        return key, value


def _probe(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[tuple[_Place, tuple[_Size, _Size]]]:
    """The place of the cache among each layer's arguments, and the sizes of the layer's keys and values.

    One token goes through the model with the model's own cache, which a recorder replaces in each layer.

    Raises:
        NotDecodableError: a layer takes no cache, or none of this form.
    """
    zero = torch.zeros(1, dtype=torch.int32, device=model.device)
    one, part = zero.long()[None], dict.fromkeys(("slot", "first", "shared"), zero)
    recorders = [_Recorder() for _ in layers]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        masks = stack.enter_context(_StepMasks(part, 1).active())
        for layer, recorder in zip(layers, recorders, strict=True):
            hook = layer.register_forward_pre_hook(recorder.replace, with_kwargs=True)
            stack.callback(hook.remove)
        try:
            model.base_model(input_ids=one, position_ids=one, use_cache=True, **masks.arguments(model))
        except Exception as error:  # a layer may ask anything of its cache; any failure means no
            if is_out_of_memory(error):
                raise
            raise NotDecodableError(f"{type(model).__name__} with a key-value cache: {first_line(error)}") from None
    for layer, recorder in zip(layers, recorders, strict=True):
        if len(recorder.places) != 1:
            raise NotDecodableError(f"{type(layer).__name__} is given no key-value cache")
        if len(recorder.sizes) != 1:
            raise NotDecodableError(f"{type(layer).__name__} does not add to its cache once")
    return [(recorder.places[0], recorder.sizes[0]) for recorder in recorders]
