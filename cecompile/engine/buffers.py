"""A bucket's static buffers on the device, and the host buffers for data on the way to the device and back."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cecompile.engine.attention import TreeMasks
from cecompile.engine.head import Readout
from cecompile.workload.plan import Bucket
from cecompile.workload.stage import StagedPass, empty_pass, views
from cecompile.workload.tree import TARGETS


@dataclass(frozen=True, slots=True)
class Readouts:
    """A pass's predictions: each token's log-probability, and the token greedy decoding would take in its place."""

    logprob: NDArray[np.float32]
    argmax: NDArray[np.int32]


Done = Callable[[StagedPass, Readouts], None]


class Inputs:
    """A host buffer for one pass's data. With CUDA the buffer is pinned, and the host waits for no copy.

    The data crosses on a separate stream, into a separate device buffer, while the pass before still runs.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._data = torch.empty(size, dtype=torch.int32, pin_memory=self._on_cuda)
        if self._on_cuda:
            self._arrival = torch.empty(size, dtype=torch.int32, device=device)
            self._stream, self._arrived = torch.cuda.Stream(), torch.cuda.Event()

    def send(self, data: NDArray[np.int32], static: Tensor) -> None:
        """Queues the copy of `data` into `static`, both (size,) int32."""
        self._data.numpy()[:] = data
        if not self._on_cuda:
            static.copy_(self._data)
            return
        with torch.cuda.stream(self._stream):
            self._arrival.copy_(self._data, non_blocking=True)
            self._arrived.record()
        self._arrived.wait()
        static.copy_(self._arrival)


class Outputs:
    """Host buffers for one pass's outputs. With CUDA the buffers are pinned, and only `collect` waits for the copy."""

    def __init__(self, readouts: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._logprob = torch.empty(readouts, TARGETS, dtype=torch.float32, pin_memory=on_cuda)
        self._argmax = torch.empty(readouts, dtype=torch.int32, pin_memory=on_cuda)
        self._filled = torch.cuda.Event() if on_cuda else None

    def fetch(self, logprob: Tensor, argmax: Tensor) -> "Outputs":
        """Queues the copy of (readouts, TARGETS) and (readouts,) to the host; returns these buffers."""
        self._logprob.copy_(logprob, non_blocking=True)
        self._argmax.copy_(argmax, non_blocking=True)
        if self._filled is not None:
            self._filled.record()
        return self

    def collect(self, one: StagedPass) -> Readouts:
        """Waits for the outputs; returns the outputs that the pass uses."""
        if self._filled is not None:
            self._filled.synchronize()
        return Readouts(self._logprob.numpy().reshape(-1)[one.entry], self._argmax.numpy()[one.entry // TARGETS])


class BucketBuffers:
    """A bucket's static buffers.

    Attributes:
        data: a pass's data, (n,) int32.
        part: views of `data` by name.
        masks: the masks that read `part`.
        logprob, argmax: outputs, (readouts, TARGETS) float32 and (readouts,) int32.
    """

    def __init__(self, bucket: Bucket, blocks: bool, device: torch.device) -> None:
        self.bucket = bucket
        self.data = torch.from_numpy(empty_pass(bucket, blocks)).to(device)
        self.part: dict[str, Tensor] = views(self.data, bucket, blocks)
        self.masks = TreeMasks(self.part)
        self.logprob = torch.zeros(bucket.readouts, TARGETS, dtype=torch.float32, device=device)
        self.argmax = torch.zeros(bucket.readouts, dtype=torch.int32, device=device)
        self._outputs = cycle([Outputs(bucket.readouts, device) for _ in range(2)])

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """The decoder's arguments for the pass in the buffers."""
        token_ids, depth = self.part["token_ids"].long(), self.part["depth"].long()
        return {"token_ids": token_ids, "position_ids": depth, **self.masks.arguments(model)}

    def read_out(self, readout: Readout, hidden: Tensor, readouts: int, at_once: int) -> None:
        """Computes the first `readouts` outputs from the last hidden states, `at_once` at a time."""
        hidden = hidden.flatten(0, 1)
        for at in range(0, readouts, at_once):
            chunk = slice(at, at + at_once)
            chosen = hidden.index_select(0, self.part["position"][chunk])
            self.logprob[chunk], self.argmax[chunk] = readout(chosen, self.part["target"][chunk])

    def fetch(self) -> Outputs:
        """Queues the copy of the outputs to host buffers, which are overwritten by the next but one `fetch`."""
        return next(self._outputs).fetch(self.logprob, self.argmax)


class Collector:
    """Collects passes in order. On CUDA the host collects a pass while the device runs the next.

    `done` is called with each pass and its readouts. `out` holds the readouts collected so far.
    """

    def __init__(self, device: torch.device, done: Done) -> None:
        self._late, self._done = device.type != "cpu", done
        self._queued: tuple[StagedPass, Outputs] | None = None
        self.out: list[Readouts] = []

    def add(self, one: StagedPass, outputs: Outputs) -> None:
        """Takes a pass whose outputs are being fetched, and collects the previous pass."""
        self.flush()
        self._queued = one, outputs
        if not self._late:
            self.flush()

    def flush(self) -> None:
        """Collects the last pass, if not yet collected."""
        if self._queued is not None:
            (one, outputs), self._queued = self._queued, None
            self.out.append(outputs.collect(one))
            self._done(one, self.out[-1])
