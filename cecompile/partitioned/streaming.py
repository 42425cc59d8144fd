"""Passes through a model whose layers are not in memory: many passes go through one layer, then through the next.

A sweep takes as many passes as there is memory for their hidden states. Each is begun (embedded), goes through layer
after layer as the feed brings them, and is finished (last norm, head). All this is the stock forward with our
attention, as in `forward.Engine`, whose numbers these are: a compiled layer is the same code on the same inputs. Each
kind of layer has a module per place of the feed, a copy of the model's own whose weights are what lies in that place;
so on CUDA a bucket has one graph to begin, one per kind and place, and one to finish.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.engine.attention import TreeMasks, install
from cecompile.engine.cuda_graph import capture
from cecompile.engine.forward import Outputs, Readouts, compile_options, compiled_parts, read_out
from cecompile.engine.head import readout_of
from cecompile.model.layer_layout import PLACES
from cecompile.model.structure import decoder_layers, kinds_of
from cecompile.partitioned.layer_feed import LayerFeed
from cecompile.partitioned.stations import LayerwiseModel
from cecompile.workload.plan import Bucket
from cecompile.workload.stage import StagedPass, data_size, empty_pass, views
from cecompile.workload.tree import TARGETS


@dataclass(frozen=True, slots=True)
class Streaming:
    """How the weights of a run's layers came.

    Attributes:
        sweeps: times that all layers were read.
        passes_per_sweep: most passes that go through a layer at once.
        layer_bytes: read per layer.
        read_bytes: in all.
        read_seconds: in which something was being read.
        waited_seconds: in which the device had nothing to do until a layer had come.
    """

    sweeps: int
    passes_per_sweep: int
    layer_bytes: int
    read_bytes: int
    read_seconds: float
    waited_seconds: float

    def summary(self) -> dict[str, Any]:
        """results.json's `streaming`."""
        return asdict(self)


class StreamingEngine:
    """A model ready to run passes of fixed shapes, its layers streamed.

    Args:
        model: a stock causal model in evaluation mode; what is beside its layers is on its device.
        buckets: the shapes, largest first.
        feed: of its layers.
        passes: how many go through a layer at once; for each there is memory for hidden states.
        attention, compiled, readout_chunk, captured: see `forward.Engine`.

    Attributes:
        streaming: how the weights of the last `run` came.

    Raises:
        UserError: this model's layers cannot be streamed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        buckets: Sequence[Bucket],
        feed: LayerFeed,
        *,
        passes: int,
        attention: str,
        compiled: bool,
        readout_chunk: int,
        captured: bool | None = None,
    ) -> None:
        self.stations = LayerwiseModel(model)
        self.buckets = tuple(buckets)
        self.feed = feed
        self.streaming: Streaming | None = None
        install(model, attention)
        self._model = model
        self._device = model.device
        self._chunk = readout_chunk
        self._kinds = kinds_of(model)
        self._modules = [
            [_module(model, self._kinds.index(kind), feed, place) for place in range(PLACES)]
            for kind in range(max(self._kinds) + 1)
        ]
        self._readout = readout_of(model)
        beside = compiled_parts(model)[feed.layers :]
        self.modules: list[nn.Module] = [module for places in self._modules for module in places]
        for module in beside:
            module._compiled_call_impl = None  # whatever another engine has set
        if compiled:
            options = compile_options(model, inputs_free=True)  # what a layer is given lies in a buffer of ours
            for module in (*self.modules, *beside):
                module.compile(fullgraph=True, dynamic=False, options=options)
            self._readout = torch.compile(self._readout, fullgraph=True, dynamic=False, options=options)
        self._capture = self._device.type == "cuda" and (compiled if captured is None else captured)
        self._pool = torch.cuda.graph_pool_handle() if self._capture else None
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        blocks, width = attention == "flex", self.stations.width
        with torch.inference_mode():
            self._shapes = [_Shape(b, blocks, width if self._capture else 0, model) for b in buckets]
            size = max(data_size(bucket, blocks) for bucket in buckets)
            self._places = [_Place(size, buckets[0].slots, width, model) for _ in range(passes)]

    @torch.inference_mode()
    def warm_up(self, done: Callable[[Bucket], None] = lambda _: None) -> None:
        """Compiles, runs and captures every bucket, largest first. `done` is called after each."""
        self.feed.settle()  # while a graph is captured, no other thread may use the device
        with self.stations.open():
            for shape in self._shapes:
                self._warm_up(shape)
                done(shape.bucket)

    def _warm_up(self, shape: "_Shape") -> None:
        place = self._places[0]
        hidden = shape.hidden if shape.hidden is not None else place.hidden_of(shape.bucket)

        def begin() -> None:
            hidden.copy_(self._embedded(shape))

        def step(kind: int, turn: int) -> None:
            hidden.copy_(self._through(shape, kind, turn, hidden))

        def finish() -> None:
            self._read_out(shape, hidden, shape.bucket.readouts)

        turns = [(kind, turn) for kind in range(len(self._modules)) for turn in range(PLACES)]
        if self._capture:
            shape.begin = capture(begin, self._pool)
            shape.steps = {which: capture(functools.partial(step, *which), self._pool) for which in turns}
            shape.finish = capture(finish, self._pool)
        else:
            begin()
            for which in turns:
                step(*which)
            finish()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def run(
        self, passes: Iterable[StagedPass], done: Callable[[StagedPass, Readouts], None] = lambda *_: None
    ) -> list[Readouts]:
        """Runs the passes in order, sweep by sweep. `done` is called with each and what it read out, in order.

        Raises:
            UserError: a layer cannot be read.
        """
        out: list[Readouts] = []

        def collect(one: StagedPass, readouts: Readouts) -> None:
            out.append(readouts)
            done(one, readouts)

        left, feed = iter(passes), self.feed
        sweeps, most, waited = 0, 0, 0.0
        read, stood = feed.read_seconds, feed.waited
        while together := list(islice(left, len(self._places))):
            sweeps, most = sweeps + 1, max(most, len(together))
            waited += self._sweep(together, collect)
        if self._device.type == "cpu":
            waited = feed.waited - stood
        self.streaming = Streaming(
            sweeps, most, feed.layer_bytes, sweeps * feed.layers * feed.layer_bytes, feed.read_seconds - read, waited
        )
        return out

    def _sweep(self, passes: Sequence[StagedPass], done: Callable[[StagedPass, Readouts], None]) -> float:
        """Runs some passes; the seconds that a CUDA device waited for layers."""
        feed, waits = self.feed, _Waits(self._device)
        at_work = [(self._places[i], self._shapes[one.bucket]) for i, one in enumerate(passes)]
        feed.rewind()
        with self.stations.open():
            self._send(passes)
            for place, shape in at_work:
                shape.take(place)
                hidden = place.hidden_of(shape.bucket)
                if shape.begin is None or shape.hidden is None:
                    hidden.copy_(self._embedded(shape))
                else:
                    shape.begin.replay()
                    hidden.copy_(shape.hidden)
            for kind in self._kinds:
                waits.begin()
                turn = feed.take()
                waits.end()
                for place, shape in at_work:
                    self._step(place, shape, kind, turn)
                feed.give_back()
            self._finish(passes, at_work, done)
        return waits.seconds()

    def _send(self, passes: Sequence[StagedPass]) -> None:
        """Copies the passes' data to the device, where nothing uses those of the sweep before any more."""
        with torch.cuda.stream(self._copies):
            for place, one in zip(self._places, passes, strict=False):
                place.data[: len(one.data)].copy_(torch.from_numpy(one.data))
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def _step(self, place: "_Place", shape: "_Shape", kind: int, turn: int) -> None:
        """One pass through the layer that is in place `turn` of the feed."""
        shape.take(place)
        hidden = place.hidden_of(shape.bucket)
        if shape.hidden is None:
            hidden.copy_(self._through(shape, kind, turn, hidden))
        else:
            shape.hidden.copy_(hidden)
            shape.steps[kind, turn].replay()
            hidden.copy_(shape.hidden)

    def _finish(
        self, passes: Sequence[StagedPass], at_work: Sequence[tuple["_Place", "_Shape"]],
        done: Callable[[StagedPass, Readouts], None],
    ) -> None:  # fmt: skip
        """Reads the passes out; on CUDA the host collects one while the device runs the next."""
        queued: tuple[StagedPass, Outputs] | None = None
        for number, (one, (place, shape)) in enumerate(zip(passes, at_work, strict=True)):
            shape.take(place)
            hidden = place.hidden_of(shape.bucket)
            if shape.finish is None or shape.hidden is None:
                self._read_out(shape, hidden, int(one.entry.max()) // TARGETS + 1)
            else:
                shape.hidden.copy_(hidden)
                shape.finish.replay()
            outputs = shape.outputs[number % 2]
            outputs.fetch(shape.logprob, shape.argmax)
            if queued is not None:
                done(queued[0], queued[1].collect(queued[0]))
            queued = one, outputs
            if self._device.type == "cpu":
                done(one, outputs.collect(one))
                queued = None
        if queued is not None:
            done(queued[0], queued[1].collect(queued[0]))

    def _embedded(self, shape: "_Shape") -> Tensor:
        with shape.masks.active():
            return self.stations.begin(**self._arguments(shape))

    def _through(self, shape: "_Shape", kind: int, turn: int, hidden: Tensor) -> Tensor:
        with shape.masks.active():
            place, layer = self._kinds.index(kind), self._modules[kind][turn]
            return self.stations.step(place, layer, received=hidden, **self._arguments(shape))

    def _read_out(self, shape: "_Shape", hidden: Tensor, readouts: int) -> None:
        with shape.masks.active():
            hidden = self.stations.finish(received=hidden, **self._arguments(shape))
        read_out(self._readout, hidden, shape.part, readouts, self._chunk, shape.logprob, shape.argmax)

    def _arguments(self, shape: "_Shape") -> dict[str, Any]:
        return {
            "token_ids": shape.part["token_ids"].long(),
            "position_ids": shape.part["depth"].long(),
            **shape.masks.arguments(self._model),
        }


class _Shape:
    """A bucket's static buffers, and its graphs once captured; then `hidden` is what goes into them and comes out."""

    def __init__(self, bucket: Bucket, blocks: bool, width: int, model: PreTrainedModel) -> None:
        device = model.device
        self.bucket = bucket
        self.begin: torch.cuda.CUDAGraph | None = None
        self.finish: torch.cuda.CUDAGraph | None = None
        self.steps: Mapping[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._data = torch.from_numpy(empty_pass(bucket, blocks)).to(device)
        self.part: dict[str, Tensor] = views(self._data, bucket, blocks)
        self.masks = TreeMasks(self.part)
        self.hidden: Tensor | None = None
        if width:
            self.hidden = torch.zeros(*bucket.shape, width, dtype=model.dtype, device=device)
        self.logprob = torch.zeros(bucket.readouts, TARGETS, dtype=torch.float32, device=device)
        self.argmax = torch.zeros(bucket.readouts, dtype=torch.int32, device=device)
        self.outputs = [Outputs(bucket.readouts, device) for _ in range(2)]

    def take(self, place: "_Place") -> None:
        """Makes a pass's data that of the bucket."""
        self._data.copy_(place.data[: len(self._data)])


class _Place:
    """What is kept of a pass while it is under way: its data, and its hidden states between two layers."""

    def __init__(self, size: int, slots: int, width: int, model: PreTrainedModel) -> None:
        self.data = torch.zeros(size, dtype=torch.int32, device=model.device)
        self._hidden = torch.zeros(slots, width, dtype=model.dtype, device=model.device)

    def hidden_of(self, bucket: Bucket) -> Tensor:
        """(rows, length, width) of the pass of a bucket."""
        return self._hidden[: bucket.slots].view(*bucket.shape, -1)


class _Waits:
    """How long a CUDA device stands still between two points of its queue; nothing on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []

    def begin(self) -> None:
        """All that is to be done before waiting is queued."""
        self._mark()

    def end(self) -> None:
        """What is waited for is queued."""
        self._mark()

    def _mark(self) -> None:
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def seconds(self) -> float:
        """In all; once the device is done."""
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        return sum(begun.elapsed_time(ended) for begun, ended in pairs) / 1000


def _module(model: PreTrainedModel, index: int, feed: LayerFeed, place: int) -> nn.Module:
    """A copy of a layer whose weights are what lies in a place of the feed."""
    config = model.config
    memo = {id(one): one for one in (config, config.get_text_config())}  # which say what attention there is
    layer = copy.deepcopy(decoder_layers(model)[index], memo)
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
