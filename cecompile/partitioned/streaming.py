"""Passes through a model whose layers are not in memory: many passes go through one layer, then through the next.

A sweep takes as many passes as there is memory for their hidden states. Each pass begins (embedding), goes through
layer after layer as the feed brings the layers, and finishes (last norm, head). All steps are the stock forward with
our attention. The results equal those of `forward.Engine`: a compiled layer is the same code on the same inputs. Each
kind of layer has one module per place of the feed, a copy of the model's own layer over the weights in that place. So
on CUDA a bucket has one graph to begin, one per kind and place, and one to finish.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.engine.attention import install
from cecompile.engine.buffers import BucketBuffers, Collector, Done, Readouts
from cecompile.engine.cuda_graph import capture
from cecompile.engine.head import readout_of
from cecompile.engine.parts import compile_modules, compile_options, compiled_parts
from cecompile.model.layer_layout import PLACES
from cecompile.model.structure import decoder_layers, kinds_of
from cecompile.partitioned.layer_feed import LayerFeed
from cecompile.partitioned.stations import LayerwiseModel
from cecompile.workload.plan import Bucket
from cecompile.workload.stage import StagedPass, data_size
from cecompile.workload.tree import TARGETS

_Step = tuple[int, int] | str  # of a pass: "begin", "finish", or the kind of a layer and its place in the feed


@dataclass(frozen=True, slots=True)
class Streaming:
    """The reading and the waiting of a run with streamed layers: results.json's `streaming`."""

    sweeps: int  # how often all layers were read
    passes_per_sweep: int  # the most passes that went through a layer at once
    layer_bytes: int  # read per layer
    read_bytes: int  # read in all
    read_seconds: float  # during which something was being read
    waited_seconds: float  # during which the device waited for a layer


class StreamingEngine:
    """A model ready to run passes of fixed shapes, its layers streamed.

    Args:
        model: a stock causal model in evaluation mode; its weights beside the layers are on its device.
        buckets: the shapes, largest first.
        feed: of the model's layers.
        passes: the most that go through a layer at once; hidden states are kept for each.
        attention, compiled, readout_chunk: see `forward.Engine`.

    Attributes:
        modules: the layers that run in place of the model's own.
        streaming: of the last `run`; None before the first.

    Raises:
        UserError: this model's layers cannot be streamed.
    """

    def __init__(
        self, model: PreTrainedModel, buckets: Sequence[Bucket], feed: LayerFeed, *, passes: int, attention: str,
        compiled: bool, readout_chunk: int,
    ) -> None:  # fmt: skip
        self.stations = LayerwiseModel(model)
        self.buckets = tuple(buckets)
        self.feed = feed
        self.streaming: Streaming | None = None
        install(model, attention)
        self._model, self._device = model, model.device
        self._chunk = readout_chunk
        self._kinds = kinds_of(model)
        turns = [(kind, turn) for kind in range(max(self._kinds) + 1) for turn in range(PLACES)]
        self._modules = {(kind, turn): _module(model, self._kinds.index(kind), feed, turn) for kind, turn in turns}
        self._readout = readout_of(model)
        beside = compiled_parts(model)[feed.layers :]
        self.modules = list(self._modules.values())
        for module in beside:
            module._compiled_call_impl = None  # another engine may have set it
        if compiled:
            options = compile_options(model, inputs_free=True)  # a layer's input lies in a buffer of this engine
            self._readout = compile_modules([*self.modules, *beside], self._readout, options)
        on_cuda = self._device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_cuda and compiled else None
        self._copies = torch.cuda.Stream(self._device) if on_cuda else None
        blocks, width = attention == "flex", self.stations.width
        with torch.inference_mode():
            self._shapes = [_Shape(b, blocks, 0 if self._pool is None else width, model) for b in buckets]
            size = max(data_size(bucket, blocks) for bucket in buckets)
            self._places = [_Place(size, buckets[0].slots, width, model) for _ in range(passes)]

    @torch.inference_mode()
    def warm_up(self, done: Callable[[Bucket], None] = lambda _: None) -> None:
        """Compiles, runs and captures every bucket, largest first. `done` is called after each."""
        self.feed.settle()  # while a graph is captured, no other thread may use the device
        steps: list[_Step] = ["begin", *self._modules, "finish"]
        with self.stations.open():
            for shape in self._shapes:
                hidden = self._places[0].hidden_of(shape.bucket) if self._pool is None else shape.hidden
                for step in steps:
                    compute = functools.partial(self._compute, shape, step, hidden, shape.bucket.readouts)
                    if self._pool is None:
                        compute()
                    else:
                        shape.graphs[step] = capture(compute, self._pool)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                done(shape.bucket)

    @torch.inference_mode()
    def run(self, passes: Iterable[StagedPass], done: Done = lambda *_: None) -> list[Readouts]:
        """Runs the passes in order, sweep by sweep. `done` is called with each pass and its readouts, in order.

        Raises:
            UserError: a layer cannot be read.
        """
        left, feed, collector = iter(passes), self.feed, Collector(self._device, done)
        sweeps, most, waited = 0, 0, 0.0
        read, stood = feed.read_seconds, feed.waited
        while together := list(islice(left, len(self._places))):
            sweeps, most = sweeps + 1, max(most, len(together))
            waited += self._sweep(together, collector)
        if self._device.type == "cpu":
            waited = feed.waited - stood
        self.streaming = Streaming(
            sweeps, most, feed.layer_bytes, sweeps * feed.layers * feed.layer_bytes, feed.read_seconds - read, waited
        )
        return collector.out

    def _sweep(self, passes: Sequence[StagedPass], collector: Collector) -> float:
        """Runs some passes; returns the seconds that a CUDA device waited for layers."""
        waits: list[torch.cuda.Event] = []  # pairs: all before a layer is queued, and the layer has come
        at_work = [(self._places[i], self._shapes[one.bucket]) for i, one in enumerate(passes)]
        self.feed.rewind()
        with self.stations.open():
            self._send(passes)
            for place, shape in at_work:
                self._run(place, shape, "begin")
            for kind in self._kinds:
                self._mark(waits)
                turn = self.feed.take()
                self._mark(waits)
                for place, shape in at_work:
                    self._run(place, shape, (kind, turn))
                self.feed.give_back()
            for one, (place, shape) in zip(passes, at_work, strict=True):
                self._run(place, shape, "finish", int(one.entry.max()) // TARGETS + 1)
                collector.add(one, shape.fetch())
            collector.flush()
        return sum(begun.elapsed_time(ended) for begun, ended in zip(waits[::2], waits[1::2], strict=True)) / 1000

    def _mark(self, events: list[torch.cuda.Event]) -> None:
        """Adds the end of a CUDA device's queue to some events."""
        if self._device.type == "cuda":
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

    def _send(self, passes: Sequence[StagedPass]) -> None:
        """Copies the passes' data to the device, where nothing uses the data of the last sweep any more."""
        with torch.cuda.stream(self._copies):
            for place, one in zip(self._places, passes, strict=False):
                place.data[: len(one.data)].copy_(torch.from_numpy(one.data))
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def _run(self, place: "_Place", shape: "_Shape", step: _Step, readouts: int = 0) -> None:
        """Runs one step of the pass in a place, by the step's graph where there is one; see `_compute`."""
        shape.data.copy_(place.data[: len(shape.data)])
        hidden = place.hidden_of(shape.bucket)
        if self._pool is None:
            self._compute(shape, step, hidden, readouts)
            return
        if step != "begin":
            shape.hidden.copy_(hidden)
        shape.graphs[step].replay()
        if step != "finish":
            hidden.copy_(shape.hidden)

    def _compute(self, shape: "_Shape", step: _Step, hidden: Tensor, readouts: int) -> None:
        """Runs one step of the pass in a bucket's buffers.

        Overwrites the pass's `hidden` states, (rows, length, width); to finish, computes at least `readouts` readouts.
        """
        with shape.masks.active():
            arguments = shape.arguments(self._model)
            if step == "begin":
                hidden.copy_(self.stations.begin(**arguments))
            elif isinstance(step, tuple):
                place, layer = self._kinds.index(step[0]), self._modules[step]
                hidden.copy_(self.stations.step(place, layer, received=hidden, **arguments))
            else:
                hidden = self.stations.finish(received=hidden, **arguments)
        if step == "finish":
            shape.read_out(self._readout, hidden, readouts, self._chunk)


class _Shape(BucketBuffers):
    """A bucket's buffers, and its graphs once captured. The graphs use `hidden`, which has width 0 without graphs."""

    def __init__(self, bucket: Bucket, blocks: bool, width: int, model: PreTrainedModel) -> None:
        super().__init__(bucket, blocks, model.device)
        self.graphs: dict[_Step, torch.cuda.CUDAGraph] = {}
        self.hidden = torch.zeros(*bucket.shape, width, dtype=model.dtype, device=model.device)


class _Place:
    """A pass under way: its data, and its hidden states between two layers."""

    def __init__(self, size: int, slots: int, width: int, model: PreTrainedModel) -> None:
        self.data = torch.zeros(size, dtype=torch.int32, device=model.device)
        self._hidden = torch.zeros(slots, width, dtype=model.dtype, device=model.device)

    def hidden_of(self, bucket: Bucket) -> Tensor:
        """The hidden states of a pass of this bucket, (rows, length, width)."""
        return self._hidden[: bucket.slots].view(*bucket.shape, -1)


def _module(model: PreTrainedModel, index: int, feed: LayerFeed, place: int) -> nn.Module:
    """A copy of a layer over the weights in a place of the feed."""
    configs = (model.config, model.config.get_text_config())  # not copied: the configurations name the attention in use
    layer = copy.deepcopy(decoder_layers(model)[index], {id(one): one for one in configs})
    views_of = feed.layout.views(feed.places[place])
    for name, module in layer.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                view = views_of.get(f"{name}.{key}" if name else key)
                if tensor is not None and view is not None:
                    held[key] = nn.Parameter(view, requires_grad=False) if held is module._parameters else view
                elif tensor is not None:
                    held[key] = tensor.to(feed.places[place].device)
    return layer
