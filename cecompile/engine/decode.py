"""Greedy decoding of many rows at once: the static pass with a key-value cache.

All rows in flight share one cache, a row of `shape.slots` token slots in every layer, of which each has a segment of
its own. A step reads a few tokens, each with its slot and the first slot of its segment; it sees its segment up to
itself, and its position id is its place there. So one fixed shape serves any mix of prompts being read and answers
being written, whatever their lengths, and the keys and values of the whole cache are read once a step, not once a row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from cecompile.engine.attention import Masks, dense
from cecompile.engine.cuda_graph import capture
from cecompile.engine.head import Readout
from cecompile.engine.longrope import Frequencies
from cecompile.errors import first_line
from cecompile.model.structure import decoder_layers
from cecompile.workload.decode_schedule import DecodeShape, Step

_Place = int | str  # of an argument in a call: its number or its name
_Size = tuple[int, int]  # heads, head size


class NotDecodableError(Exception):
    """This model's layers do not take a key-value cache in the form that is used here; the text says why."""


class Decoder:
    """A model ready to read and write a token at a time.

    Args:
        model: with our attention installed and, where it is to be compiled, its layers compiled.
        readout: the model's head, as `head.readout_of` makes it.
        shape: of the cache and of its steps.
        pool: memory pool of the CUDA graphs that each size of step is captured in; None captures nothing.

    Raises:
        NotDecodableError: the model has its own way with keys and values.
    """

    def __init__(
        self, model: PreTrainedModel, readout: Readout, shape: DecodeShape, pool: Any, rope: Frequencies
    ) -> None:  # fmt: skip
        if max(shape.step_tokens) >= shape.slots:
            raise ValueError(f"a cache of {shape.slots} slots does not hold a step of {max(shape.step_tokens)} tokens")
        self.shape = shape
        self._model = model
        self._body = model.base_model
        self._readout = readout
        self._device = model.device
        self._layers = decoder_layers(model)
        self._pool = pool
        self._rope = rope
        self._clear: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            found = _probe(model, self._layers)
            self._places = [place for place, _ in found]
            self._caches = self._allocate([sizes for _, sizes in found])
            self._steps = [_StepBuffers(size, shape, self._device) for size in shape.step_tokens]

    @torch.inference_mode()
    def warm_up(self, done: Callable[[int], None] = lambda _: None) -> None:
        """Compiles, runs and captures every size of step, largest first. `done` is called with each."""
        for step in self._steps:
            forward = functools.partial(self._forward, step)
            if self._pool is not None:
                step.graph = capture(forward, self._pool)
            else:
                forward()
            done(step.size)

    def clear(self) -> None:
        """Empties the cache. Due whenever the model has run anything else: captured passes work in its memory."""
        if self._clear is not None:
            self._clear.replay()

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Reads the step's tokens into the cache.

        Returns:
            Per token read out (`step.read`), (n,) each: the log-probability of its target, natural logarithm, and the
            token of the highest.
        """
        buffers = next(b for b in reversed(self._steps) if b.size >= len(step.token_ids))
        buffers.load(step)
        self._rope.choose(0)
        if buffers.graph is not None:
            buffers.graph.replay()
        else:
            self._forward(buffers)
        return buffers.collect(len(step.read))

    def _allocate(self, sizes: Sequence[tuple[_Size, _Size]]) -> list["_LayerCache"]:
        """Every layer's cache, filled with zeros: what nobody sees is multiplied by zero, and must be a number.

        With a pool the memory is the pool's. There the activations of the passes captured before lie idle while
        answers are decoded, and the cache takes their place.
        """
        caches: list[_LayerCache] = []

        def allocate() -> None:
            caches.extend(_LayerCache(self.shape.slots, *size, self._model.dtype, self._device) for size in sizes)

        if self._pool is None:
            allocate()
            return caches
        self._clear = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._clear, pool=self._pool):
            allocate()
        self._clear.replay()
        return caches

    def _forward(self, step: "_StepBuffers") -> None:
        part = step.part
        masks = _StepMasks(part["slot"], part["first"], self.shape.slots)
        with masks.active(), self._rope.fixed(), self._caching(part["slot"]):
            hidden = self._body(
                input_ids=part["token_ids"].long()[None],
                position_ids=(part["slot"] - part["first"]).long()[None],
                use_cache=False,
                **masks.arguments(self._model),
            ).last_hidden_state
        chosen = hidden[0].index_select(0, part["read"])
        logprob, argmax = self._readout(chosen, part["target"][:, None])
        step.logprob.copy_(logprob[:, 0])
        step.argmax.copy_(argmax)

    @contextmanager
    def _caching(self, slot: Tensor) -> Iterator[None]:
        """While this lasts, the decoder layers are called with their own part of the cache."""
        slots = slot.long()
        with ExitStack() as stack:
            for layer, place, cache in zip(self._layers, self._places, self._caches, strict=True):
                cache.slots = slots
                stack.enter_context(_called_with(layer, place, cache))
            yield


class _LayerCache:
    """One layer's keys and values, and what a layer calls to add to them."""

    def __init__(self, slots: int, key: _Size, value: _Size, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(1, key[0], slots, key[1], dtype=dtype, device=device)
        self.values = torch.zeros(1, value[0], slots, value[1], dtype=dtype, device=device)
        self.slots = torch.zeros(0, dtype=torch.long, device=device)

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes (1, heads, tokens, head size) at the step's slots; returns everything there is."""
        self.keys.index_copy_(2, self.slots, key)
        self.values.index_copy_(2, self.slots, value)
        return self.keys, self.values


class _StepMasks(Masks):
    """The masks of a step: a token sees its segment up to itself."""

    def __init__(self, slot: Tensor, first: Tensor, slots: int) -> None:
        self._slot, self._first, self._slots = slot, first, slots

    def get(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(1, 1, tokens, slots), 0 where visible, else minus infinity."""
        key = torch.arange(self._slots, device=self._slot.device, dtype=self._slot.dtype)
        slot, first = self._slot[:, None], self._first[:, None]
        visible = (first <= key) & (key <= slot)
        if window is not None:
            visible &= slot - key < window
        return dense(visible[None], dtype)


class _StepBuffers:
    """The static buffers of one size of step, and its graph once captured."""

    def __init__(self, size: int, shape: DecodeShape, device: torch.device) -> None:
        self.size = size
        self.graph: torch.cuda.CUDAGraph | None = None
        self._unused = shape.slots - 1
        lengths = {"token_ids": size, "slot": size, "first": size, "read": shape.lanes, "target": shape.lanes}
        on_cuda = device.type == "cuda"
        self._host = torch.zeros(sum(lengths.values()), dtype=torch.int32, pin_memory=on_cuda)
        self._data = self._host.to(device, copy=True)
        self.part = dict(zip(lengths, self._data.split(list(lengths.values())), strict=True))
        self._given = {n: t.numpy() for n, t in zip(lengths, self._host.split(list(lengths.values())), strict=True)}
        self.logprob = torch.zeros(shape.lanes, dtype=torch.float32, device=device)
        self.argmax = torch.zeros(shape.lanes, dtype=torch.int32, device=device)

    def load(self, step: Step) -> None:
        """Copies a step into the static buffers; slots that it does not use read a token nobody sees."""
        used, read = len(step.token_ids), len(step.read)
        for name, values in (("token_ids", step.token_ids), ("slot", step.slot), ("first", step.first)):
            self._given[name][:used] = values
            self._given[name][used:] = 0 if name == "token_ids" else self._unused
        self._given["read"][:read] = step.read
        self._given["read"][read:] = 0
        self._given["target"][:read] = step.target
        self._data.copy_(self._host)  # waits: a step without readouts returns before the device has read its tokens

    def collect(self, read: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The outputs in use, on the host."""
        logprob, argmax = (t[:read].to("cpu", copy=True).numpy() for t in (self.logprob, self.argmax))
        return logprob, argmax


@contextmanager
def _called_with(layer: nn.Module, place: _Place, cache: Any) -> Iterator[None]:
    """Passes `cache` to `layer` as its key-value cache, whenever the layer is called while this lasts."""
    call: Callable[..., Any] | None = layer._compiled_call_impl

    def with_cache(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _put(cache, place, args, kwargs)
        return (call or layer._call_impl)(*args, **kwargs)

    layer._compiled_call_impl = with_cache
    try:
        yield
    finally:
        layer._compiled_call_impl = call


def _put(value: Any, place: _Place, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, with `value` as the one at `place`."""
    if isinstance(place, str):
        return args, kwargs | {place: value}
    return (*args[:place], value, *args[place + 1 :]), kwargs


class _Recorder:
    """Replaces the cache that a layer is called with, and notes the argument's place and what is added."""

    def __init__(self) -> None:
        self.places: list[_Place] = []
        self.sizes: list[tuple[_Size, _Size]] = []

    def replace(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Hook to run before a layer: names of arguments differ between architectures and versions."""
        given: dict[_Place, Any] = {**dict(enumerate(args)), **kwargs}
        for place in (place for place, value in given.items() if isinstance(value, Cache)):
            self.places.append(place)
            args, kwargs = _put(self, place, args, kwargs)
        return args, kwargs

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Notes heads and head size of keys and of values."""
        self.sizes.append(((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])))
        return key, value


def _probe(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[tuple[_Place, tuple[_Size, _Size]]]:
    """Per layer, the place of its cache among its arguments, and the sizes of its keys and of its values.

    One token through the model shows them: with the model's own cache, which each layer's call has exchanged.

    Raises:
        NotDecodableError: a layer takes no cache, or not in this form.
    """
    zero = torch.zeros(1, dtype=torch.int32, device=model.device)
    one = zero.long()[None]
    recorders = [_Recorder() for _ in layers]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        masks = stack.enter_context(_StepMasks(zero, zero, 1).active())
        for layer, recorder in zip(layers, recorders, strict=True):
            hook = layer.register_forward_pre_hook(recorder.replace, with_kwargs=True)
            stack.callback(hook.remove)
        try:
            model.base_model(input_ids=one, position_ids=one, use_cache=True, **masks.arguments(model))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a probe: whatever a layer asks of its cache means no
            raise NotDecodableError(f"{type(model).__name__} with a key-value cache: {first_line(error)}") from None
    for layer, recorder in zip(layers, recorders, strict=True):
        if len(recorder.places) != 1:
            raise NotDecodableError(f"{type(layer).__name__} is given no key-value cache")
        if len(recorder.sizes) != 1:
            raise NotDecodableError(f"{type(layer).__name__} does not add to its cache once")
    return [(recorder.places[0], recorder.sizes[0]) for recorder in recorders]
