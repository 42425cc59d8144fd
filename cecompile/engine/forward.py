"""The static pass: one fixed-shape forward per bucket, compiled, and captured in a CUDA graph where there is CUDA."""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import cycle

import torch
from transformers import PreTrainedModel

from cecompile.engine.attention import install
from cecompile.engine.buffers import BucketBuffers, Collector, Done, Inputs, Readouts
from cecompile.engine.cuda_graph import capture, settle
from cecompile.engine.decode import Decoder
from cecompile.engine.head import readout_of
from cecompile.engine.longrope import Frequencies
from cecompile.engine.parts import (
    Part,
    compile_modules,
    compile_options,
    compiled_parts,
    inputs_are_free,
    one_layer_of_each_kind,
)
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket
from cecompile.workload.stage import StagedPass, views
from cecompile.workload.tree import TARGETS


class Engine:
    """A model ready to run passes of fixed shapes.

    Args:
        model: a stock causal model in evaluation mode, on its device. Its attention implementation is set to ours.
        buckets: the shapes, largest first.
        attention: "flex" or "sdpa".
        compiled: compile each decoder layer and the head.
        captured: on CUDA, capture each compiled bucket in a graph.
        readout_chunk: readouts whose logits are held at once; divides every bucket's readouts.
        stage: the part of the model that runs here; None is the whole model. All parts run the same passes. All but
            the last part read out zeros.
        inputs_free: see `inputs_are_free`; None finds out when compiling for CUDA. The attribute is None if unknown.
    """

    def __init__(
        self, model: PreTrainedModel, buckets: Sequence[Bucket], *, attention: str, compiled: bool, readout_chunk: int,
        captured: bool = True, stage: Part | None = None, inputs_free: bool | None = None,
    ) -> None:  # fmt: skip
        modules = compiled_parts(model)
        for module in modules:
            module._compiled_call_impl = None  # another engine may have set it, and sets it again when it runs
        self.stage = stage or Part(model)
        self.inputs_free = inputs_free
        if compiled and inputs_free is None and model.device.type == "cuda":
            self.inputs_free = inputs_are_free(model, self.stage.trial)
        options = compile_options(model, bool(self.inputs_free)) if compiled else {}
        install(model, attention)
        self.buckets, self._chunk = tuple(buckets), readout_chunk
        self._model, self._attention = model, attention
        self.stage.reserve(max(bucket.slots for bucket in buckets))
        self._rope = Frequencies(model)
        self._readout = readout_of(model)
        self._device, self._on_cuda = model.device, model.device.type == "cuda"
        if compiled:
            self._readout = compile_modules(modules, self._readout, options)
        self._calls = [(module, module._compiled_call_impl) for module in modules]
        with torch.inference_mode():
            self._slots = [_Slot(bucket, attention == "flex", self._device) for bucket in buckets]
        self._pool = torch.cuda.graph_pool_handle() if compiled and captured and self._on_cuda else None

    @property
    def captured(self) -> bool:
        """Whether passes run as CUDA graphs."""
        return self._pool is not None

    def is_for(self, buckets: Sequence[Bucket], attention: str) -> bool:
        """Whether the engine was made for these buckets and this attention."""
        return (self.buckets, self._attention) == (tuple(buckets), attention)

    def take(self) -> None:
        """Makes the model this engine's again, as another engine may have used the model since."""
        install(self._model, self._attention)
        for module, call in self._calls:
            module._compiled_call_impl = call

    @torch.inference_mode()
    def settle(self) -> None:
        """Compiles and runs every bucket, largest first, before all weights are loaded; `warm_up` does the rest."""
        for slot in self._slots:
            if self._pool is not None:
                settle(functools.partial(self._forward, slot, slot.bucket.readouts))
            else:
                self._compile(slot)
            slot.settled = True
        self._wait()

    @torch.inference_mode()
    def warm_up(self, done: Callable[[Bucket], None] = lambda _: None) -> None:
        """Compiles and, where possible, captures every bucket, largest first. `done` is called after each."""
        for slot in self._slots:
            if self._pool is not None:
                forward = functools.partial(self._forward, slot, slot.bucket.readouts)
                slot.graph = capture(forward, self._pool, slot.settled)
            elif not slot.settled:
                self._compile(slot)
            self._wait()
            done(slot.bucket)

    def decoder(self, shape: DecodeShape) -> Decoder:
        """A decoder over this engine's model, still cold, to be compiled and captured like the engine.

        Raises:
            NotDecodableError: see `Decoder`.
        """
        return Decoder(self._model, self._readout, shape, self._pool, self._rope)

    @torch.inference_mode()
    def run(self, passes: Iterable[StagedPass], done: Done = lambda *_: None) -> list[Readouts]:
        """Runs the passes in order. `done` is called with each pass and its readouts, in order."""
        self.take()
        collector = Collector(self._device, done)
        for one in passes:
            slot = self._slots[one.bucket]
            next(slot.inputs).send(one.data, slot.data)
            if self._rope.boundary is not None:
                depth = views(one.data, slot.bucket, self._attention == "flex")["depth"]
                self._rope.choose(int(depth.max()))
            self.stage.receive(slot.bucket.shape)
            if slot.graph is not None:
                slot.graph.replay()
            else:
                self._forward(slot, int(one.entry.max()) // TARGETS + 1)
            self.stage.send(slot.bucket.shape)
            collector.add(one, slot.fetch())
        collector.flush()
        return collector.out

    def _compile(self, slot: "_Slot") -> None:
        """Runs as little of a pass as compiles all code for a bucket, or loads the code."""
        whole = type(self.stage) is Part
        with one_layer_of_each_kind(self._model) if whole else nullcontext():
            self._forward(slot, 1)

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    def _forward(self, slot: "_Slot", readouts: int) -> None:
        """Runs the pass; where the model ends in this stage, computes at least the first `readouts` readouts."""
        with slot.masks.active(), self._rope.fixed():
            hidden = self.stage(**slot.arguments(self._model))
        if self.stage.ends:
            slot.read_out(self._readout, hidden, readouts, self._chunk)


class _Slot(BucketBuffers):
    """A bucket's buffers, and the bucket's graph once captured; `settled` once the bucket has run.

    `inputs` gives host buffers in turn: the next was last used by a pass that has been collected.
    """

    def __init__(self, bucket: Bucket, blocks: bool, device: torch.device) -> None:
        super().__init__(bucket, blocks, device)
        self.settled = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs = cycle([Inputs(len(self.data), device) for _ in range(2)])
