"""The static pass: one fixed-shape forward per bucket, compiled, and captured in a CUDA graph where there is CUDA."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.engine import inductor_cpu, inductor_cuda
from cecompile.engine.attention import TreeMasks, install
from cecompile.engine.cuda_graph import capture, settle
from cecompile.engine.decode import Decoder
from cecompile.engine.head import Readout, readout_of
from cecompile.engine.longrope import Frequencies
from cecompile.model.structure import decoder_layers, norms_beside
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket
from cecompile.workload.stage import StagedPass, data_size, empty_pass, views
from cecompile.workload.tree import TARGETS

Body = Callable[..., Tensor]  # token ids (rows, length) int64, and what else a decoder is called with: hidden states


class MissingOptionError(Exception):
    """Compiling takes an option that this version of torch does not know; the text says which."""


@dataclass(frozen=True, slots=True)
class Readouts:
    """What a pass read out: per prediction its token's log-probability, and the token greedy decoding would take."""

    logprob: NDArray[np.float32]
    argmax: NDArray[np.int32]


class Part(Protocol):
    """A part of a model, as an engine runs it: hidden states come from the part before, and go to the one after.

    Attributes:
        ends: whether this is the last.
    """

    ends: bool

    def reserve(self, slots: int) -> None:
        """Makes the buffers for passes of up to so many tokens."""

    def receive(self, shape: Sequence[int]) -> None:
        """Takes what comes, of (rows, length) tokens."""

    def send(self, shape: Sequence[int]) -> None:
        """Hands on what was made last, of (rows, length) tokens."""

    def trial(self, token_ids: Tensor) -> Tensor:
        """The part's hidden states, (rows, length, width), from hidden states that are all 0."""

    def __call__(self, token_ids: Tensor, **arguments: Any) -> Tensor:
        """The part's hidden states, (rows, length, width), from those that have come."""


class Engine:
    """A model ready to run passes of fixed shapes.

    Args:
        model: a stock causal model in evaluation mode, on its device. Its attention implementation is set to ours.
        buckets: the shapes, largest first.
        attention: "flex" or "sdpa".
        compiled: compile each decoder layer and the head. Otherwise the same pass runs as it is.
        captured: on CUDA, capture each bucket in a graph; None does so if it is compiled.
        readout_chunk: readouts whose logits are held at once; divides every bucket's readouts.
        stage: what the model is of a pipeline, all stages of which run the same passes; None is all of it. One that
            does not end the pipeline reads out zeros.
        inputs_free: see `inputs_are_free`; None finds out, where it matters.

    Attributes:
        inputs_free: as found; None where it does not matter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        buckets: Sequence[Bucket],
        *,
        attention: str,
        compiled: bool,
        readout_chunk: int,
        captured: bool | None = None,
        stage: Part | None = None,
        inputs_free: bool | None = None,
    ) -> None:
        parts = compiled_parts(model)
        for module in parts:
            module._compiled_call_impl = None  # whatever another engine has set; it takes the model back when it runs
        self.inputs_free = inputs_free
        if compiled and inputs_free is None and model.device.type == "cuda":
            self.inputs_free = inputs_are_free(model, None if stage is None else stage.trial)
        options = compile_options(model, bool(self.inputs_free)) if compiled else {}
        install(model, attention)
        self.buckets = tuple(buckets)
        self.stage = stage
        self._model = model
        self._body = stage or body_of(model)
        if stage is not None:
            stage.reserve(max(bucket.slots for bucket in buckets))
        self._rope = Frequencies(model)
        self._readout = readout_of(model)
        self._chunk = readout_chunk
        self._device = model.device
        self._capture = self._device.type == "cuda" and (compiled if captured is None else captured)
        if compiled:
            for module in parts:  # identical ones share a graph per shape
                module.compile(fullgraph=True, dynamic=False, options=options)
            self._readout = torch.compile(self._readout, fullgraph=True, dynamic=False, options=options)
        self._attention = attention
        self._calls = [(module, module._compiled_call_impl) for module in parts]
        with torch.inference_mode():
            self._slots = [_Slot(bucket, attention == "flex", self._device) for bucket in buckets]
        self._pool = torch.cuda.graph_pool_handle() if self._capture else None

    def is_for(self, buckets: Sequence[Bucket], attention: str) -> bool:
        """Whether these are its buckets and its attention."""
        return (self.buckets, self._attention) == (tuple(buckets), attention)

    def take(self) -> None:
        """Makes the model this engine's, whoever has used it meanwhile."""
        install(self._model, self._attention)
        for module, call in self._calls:
            module._compiled_call_impl = call

    @torch.inference_mode()
    def settle(self) -> None:
        """Compiles and runs every bucket, largest first, whatever the weights hold yet: `warm_up` is left the rest."""
        for slot in self._slots:
            forward = functools.partial(self._forward, slot, slot.bucket.readouts)
            if self._device.type == "cuda":
                settle(forward)
            else:
                forward()
            slot.settled = True
        self._wait()

    @torch.inference_mode()
    def warm_up(self, done: Callable[[Bucket], None] = lambda _: None) -> None:
        """Compiles, runs and captures every bucket, largest first. `done` is called after each."""
        for slot in self._slots:
            forward = functools.partial(self._forward, slot, slot.bucket.readouts)
            if self._capture:
                slot.graph = capture(forward, self._pool, slot.settled)
            elif not slot.settled:
                forward()
            self._wait()
            done(slot.bucket)

    def decoder(self, shape: DecodeShape) -> Decoder:
        """What decodes with this engine's model, compiled and captured as this engine is. Not warm yet.

        Raises:
            NotDecodableError: see `Decoder`.
        """
        return Decoder(self._model, self._readout, shape, self._pool, self._rope)

    @torch.inference_mode()
    def run(
        self, passes: Iterable[StagedPass], done: Callable[[StagedPass, Readouts], None] = lambda *_: None
    ) -> list[Readouts]:
        """Runs the passes in order. `done` is called with each and what it read out, in order.

        On CUDA the host collects a pass while the device runs the next; elsewhere each pass is collected at once.
        """
        self.take()
        out: list[Readouts] = []
        queued: tuple[StagedPass, _Slot, int] | None = None

        def collect() -> None:
            if queued is not None:
                one, slot, turn = queued
                out.append(slot.collect(one, turn))
                done(one, out[-1])

        for one in passes:
            slot = self._slots[one.bucket]
            turn = slot.load(one)
            if self._rope.boundary is not None:
                self._rope.choose(slot.deepest(one))
            if self.stage is not None:
                self.stage.receive(slot.bucket.shape)
            if slot.graph is not None:
                slot.graph.replay()
            else:
                self._forward(slot, int(one.entry.max()) // TARGETS + 1)
            if self.stage is not None:
                self.stage.send(slot.bucket.shape)
            slot.unload(turn)
            collect()
            queued = one, slot, turn
            if self._device.type == "cpu":
                collect()
                queued = None
        collect()
        return out

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _forward(self, slot: "_Slot", readouts: int) -> None:
        """The pass, with at least its first `readouts` readouts where it has any."""
        part = slot.part
        with slot.masks.active(), self._rope.fixed():
            hidden = self._body(
                part["token_ids"].long(), position_ids=part["depth"].long(), **slot.masks.arguments(self._model)
            )
        if self.stage is not None and not self.stage.ends:
            return
        read_out(self._readout, hidden, part, readouts, self._chunk, slot.logprob, slot.argmax)


def read_out(
    readout: Readout, hidden: Tensor, part: Mapping[str, Tensor], readouts: int, at_once: int, logprob: Tensor,
    argmax: Tensor,
) -> None:  # fmt: skip
    """Fills in a pass's first `readouts` readouts, `at_once` by `at_once`, from its last hidden states."""
    hidden = hidden.flatten(0, 1)
    for at in range(0, readouts, at_once):
        chunk = slice(at, at + at_once)
        chosen = hidden.index_select(0, part["position"][chunk])
        logprob[chunk], argmax[chunk] = readout(chosen, part["target"][chunk])


class _Slot:
    """A bucket's static buffers, and its graph once captured. It is `settled` once it has run."""

    def __init__(self, bucket: Bucket, blocks: bool, device: torch.device) -> None:
        self.bucket = bucket
        self.settled = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self._blocks = blocks
        self._data = torch.from_numpy(empty_pass(bucket, blocks)).to(device)
        self.part: dict[str, Tensor] = views(self._data, bucket, blocks)
        self.masks = TreeMasks(self.part)
        self.logprob = torch.zeros(bucket.readouts, TARGETS, dtype=torch.float32, device=device)
        self.argmax = torch.zeros(bucket.readouts, dtype=torch.int32, device=device)
        self._turns = [_Transfer(data_size(bucket, blocks), bucket.readouts, device) for _ in range(2)]
        self._turn = 0

    def load(self, one: StagedPass) -> int:
        """Queues the copy of a pass's data into the static buffer; returns which transfer it uses.

        That was last used by the pass before last, which has been collected.
        """
        self._turn ^= 1
        self._turns[self._turn].send(one.data, self._data)
        return self._turn

    def deepest(self, one: StagedPass) -> int:
        """The depth of a pass's deepest token."""
        return int(views(one.data, self.bucket, self._blocks)["depth"].max())

    def unload(self, turn: int) -> None:
        """Queues the copy of the outputs to the host."""
        self._turns[turn].outputs.fetch(self.logprob, self.argmax)

    def collect(self, one: StagedPass, turn: int) -> Readouts:
        """Waits for the outputs of a pass and picks those in use."""
        return self._turns[turn].outputs.collect(one)


class Outputs:
    """Host buffers for what a pass reads out. With CUDA they are pinned, and only who collects waits for the copy."""

    def __init__(self, readouts: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._logprob = torch.empty(readouts, TARGETS, dtype=torch.float32, pin_memory=on_cuda)
        self._argmax = torch.empty(readouts, dtype=torch.int32, pin_memory=on_cuda)
        self._filled = torch.cuda.Event() if on_cuda else None

    def fetch(self, logprob: Tensor, argmax: Tensor) -> None:
        """Queues the copy to the host of (readouts, TARGETS) and (readouts,)."""
        self._logprob.copy_(logprob, non_blocking=True)
        self._argmax.copy_(argmax, non_blocking=True)
        if self._filled is not None:
            self._filled.record()

    def collect(self, one: StagedPass) -> Readouts:
        """Waits for the outputs of a pass, and picks those in use."""
        if self._filled is not None:
            self._filled.synchronize()
        return Readouts(self._logprob.numpy().reshape(-1)[one.entry], self._argmax.numpy()[one.entry // TARGETS])


class _Transfer:
    """Host buffers of one pass under way. With CUDA they are pinned, and nothing waits for a copy but who needs it.

    Data crosses to the device on a stream of its own, into a buffer of its own, while the pass before still runs.
    """

    def __init__(self, size: int, readouts: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._data = torch.empty(size, dtype=torch.int32, pin_memory=on_cuda)
        self.outputs = Outputs(readouts, device)
        self._cuda = _CudaSide(torch.empty(size, dtype=torch.int32, device=device)) if on_cuda else None

    def send(self, data: NDArray[np.int32], static: Tensor) -> None:
        self._data.numpy()[:] = data
        if self._cuda is None:
            static.copy_(self._data)
            return
        with torch.cuda.stream(self._cuda.stream):
            self._cuda.arrival.copy_(self._data, non_blocking=True)
            self._cuda.arrived.record()
        self._cuda.arrived.wait()
        static.copy_(self._cuda.arrival)


@dataclass(frozen=True)
class _CudaSide:
    """Where data arrives, the stream it comes on, and the event that says it has."""

    arrival: Tensor
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    arrived: torch.cuda.Event = field(default_factory=torch.cuda.Event)


def compile_options(model: PreTrainedModel, inputs_free: bool) -> dict[str, Any]:
    """Inductor options for compiling the model's parts on its device.

    Raises:
        MissingOptionError: this torch does not know one of them.
    """
    options = (
        inductor_cuda.compile_options(inputs_free)
        if model.device.type == "cuda"
        else inductor_cpu.compile_options(model)
    )
    missing = sorted(options.keys() - set(torch._inductor.list_options()))
    if missing:
        raise MissingOptionError(f"torch {torch.__version__} has no Inductor option {', '.join(missing)}")
    return options


def body_of(model: PreTrainedModel) -> Body:
    """The model's own decoder."""
    decoder = model.base_model

    def body(token_ids: Tensor, **arguments: Any) -> Tensor:
        hidden: Tensor = decoder(input_ids=token_ids, use_cache=False, **arguments).last_hidden_state
        return hidden

    return body


def compiled_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, and norms beside them but for those that are one operator of torch already."""
    return decoder_layers(model) + [m for m in norms_beside(model) if not type(m).__module__.startswith("torch.")]


@torch.inference_mode()
def inputs_are_free(model: PreTrainedModel, body: Body | None = None) -> bool:
    """Whether nobody reads the hidden states given to a decoder layer after it, so that it may overwrite them.

    Found out on a few tokens: each layer's input is filled with NaN once the layer is done, and the model's output
    stays finite all the same.

    Args:
        body: what runs the model's layers, where that is not its own decoder.
    """
    body = body or body_of(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    poisoned = 0

    def poison(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal poisoned
        hidden: Tensor = (*args, *kwargs.values())[0]  # by whatever name
        if hidden.untyped_storage().data_ptr() not in weights:
            hidden.fill_(torch.nan)
            poisoned += 1

    layers, attention = decoder_layers(model), model.config._attn_implementation
    hooks = [layer.register_forward_hook(poison, with_kwargs=True) for layer in layers]
    model.set_attn_implementation("eager")
    try:
        input_ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
        hidden = body(input_ids)
    finally:
        model.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()
    return poisoned == len(layers) and bool(hidden.isfinite().all())
