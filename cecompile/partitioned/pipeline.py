"""Pipeline parallel: a model's layers on several devices, one after another.

Each stage has some of the decoder layers. Buckets are the micro-batches: every stage makes the same plan, and hands
only hidden states on. `torch.distributed.pipelining` has schedules of a fixed number of micro-batches a step, between
which the pipeline drains, and keeps every output until its step is over. Passes here come as long as there are any,
from a counter that other replicas take from too; so what those schedules are made of is used directly,
`torch.distributed.isend` and `irecv`, and the pipeline drains once, at the end of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from cecompile.device import is_out_of_memory
from cecompile.engine.head import head_of
from cecompile.errors import CheckError
from cecompile.model.structure import LayerRange
from cecompile.partitioned.span import Span


class LostError(CheckError):
    """A stage beside this one is gone."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a pipeline this process stands.

    Attributes:
        stage, stages: its stage, of how many.
        before, after: the ranks that hidden states come from and go to, with the group of each pair; None at an end.
    """

    stage: int
    stages: int
    before: tuple[int, Any] | None
    after: tuple[int, Any] | None


def places(stages: int, rank: int, size: int, own_device: bool) -> Place:
    """Connects every stage with the next, in each of the replicas; all ranks call it.

    Args:
        stages: of a replica, which are ranks side by side; divides `size`.
        rank, size: of the default process group, which is there.
        own_device: whether each rank has a CUDA device of its own, so that NCCL connects them; else it is Gloo.
    """
    before = after = None
    for left in range(size - 1):
        if left % stages == stages - 1:
            continue
        group = dist.new_group([left, left + 1], backend="nccl" if own_device else "gloo")
        if rank == left:
            after = left + 1, group
        elif rank == left + 1:
            before = left, group
    return Place(rank % stages, stages, before, after)


class Stage:
    """A stage's layers, and the hidden states that come and go.

    Args:
        model: with the weights of its share on its device. Its other layers are taken out for good.
        share: these.
        place: in the pipeline.

    Attributes:
        begins, ends: whether it is the first or the last.
        suffices: False once memory did not suffice for a sequence `alone`.
    """

    suffices = True

    def __init__(self, model: PreTrainedModel, share: LayerRange, place: Place) -> None:
        self._span = Span.of(model, share)
        self.begins, self.ends = self._span.begins, self._span.ends
        self._head = head_of(model) if self.ends else None
        self._device, self._dtype = model.device, model.dtype
        self._from = None if place.before is None else _Wire(*place.before, model.device)
        self._to = None if place.after is None else _Wire(*place.after, model.device)
        self._come = self._made = torch.empty(0)
        self._leaving: list[tuple[Tensor, Any]] = []

    @torch.inference_mode()
    def reserve(self, slots: int) -> None:
        """Makes the buffers for passes of up to so many tokens."""
        self.wait()
        size = slots * self._span.width
        if not self.begins:
            self._come = torch.zeros(size, dtype=self._dtype, device=self._device)
        if not self.ends:
            assert self._to is not None
            self._made = torch.zeros(size, dtype=self._dtype, device=self._device)
            self._leaving = [(self._to.buffer(size, self._dtype), None) for _ in range(2)]

    def __call__(self, token_ids: Tensor, **arguments: Any) -> Tensor:
        """The hidden states after this stage's layers, (rows, length, width), from those that have come.

        Args: see `Span`.
        """
        hidden = self._span(token_ids, self._states(self._come, token_ids.shape), **arguments)
        if not self.ends:
            self._states(self._made, token_ids.shape).copy_(hidden)
        return hidden

    def trial(self, token_ids: Tensor) -> Tensor:
        """The same, of hidden states that are all 0."""
        shape = (*token_ids.shape, self._span.width)
        return self._span(token_ids, torch.zeros(shape, dtype=self._dtype, device=self._device))

    @torch.inference_mode()
    def receive(self, shape: Sequence[int]) -> None:
        """Takes what the stage before has sent, of (rows, length) tokens."""
        if self._from is not None:
            self._from.receive(self._states(self._come, shape).view(-1))

    @torch.inference_mode()
    def send(self, shape: Sequence[int]) -> None:
        """Hands on what was made last, of (rows, length) tokens; it may be made anew at once."""
        if self._to is None:
            return
        buffer, sending = self._leaving.pop(0)
        if sending is not None:
            _wait(sending)
        made = self._states(self._made, shape).view(-1)
        self._leaving.append((buffer, self._to.send(made, buffer[: len(made)])))

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        for _, sending in self._leaving:
            if sending is not None:
                _wait(sending)

    @torch.inference_mode()
    def alone(self, token_ids: Tensor) -> Tensor:
        """Runs one sequence, (1, n) int64, through all stages, each of which calls this.

        Where memory runs out it goes on with anything: the stages after it wait for it.

        Returns:
            In the last stage the logits, (1, n, vocabulary) float32; zeros of (1, n, 1) before.
        """
        logits = torch.zeros(*token_ids.shape, 1)
        self.receive(token_ids.shape)
        try:
            hidden = self(token_ids)
            if self._head is not None:
                logits = self._head(hidden[0])[None]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.suffices = False
        self.send(token_ids.shape)
        return logits

    def _states(self, buffer: Tensor, shape: Sequence[int]) -> Tensor:
        """The beginning of a buffer as hidden states; one that is not there is of any shape."""
        if not len(buffer):
            return buffer
        rows, length = shape
        return buffer[: rows * length * self._span.width].view(rows, length, self._span.width)


class _Wire:
    """To or from another rank. Where Gloo connects CUDA devices, which it cannot read, through pinned host memory."""

    def __init__(self, rank: int, group: Any, device: torch.device) -> None:
        self._rank, self._group = rank, group
        through_host = device.type == "cuda" and dist.get_backend(group) == "gloo"
        self._device = torch.device("cpu") if through_host else device
        self._arrival: Tensor | None = None
        self._through_host = through_host

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """What can be sent from."""
        return torch.zeros(size, dtype=dtype, device=self._device, pin_memory=self._through_host)

    def send(self, values: Tensor, buffer: Tensor) -> Any:
        """Sends `values` from `buffer`, which is free again after the `wait` of what this returns."""
        buffer.copy_(values)
        try:
            return dist.isend(buffer, self._rank, group=self._group)
        except RuntimeError:
            raise LostError("the stage after was lost") from None

    def receive(self, into: Tensor) -> None:
        if not self._through_host:
            _irecv(into, self._rank, self._group)
            return
        if self._arrival is None or len(self._arrival) < len(into):
            self._arrival = self.buffer(len(into), into.dtype)
        arrived = self._arrival[: len(into)]
        _irecv(arrived, self._rank, self._group)
        into.copy_(arrived)


def _irecv(into: Tensor, rank: int, group: Any) -> None:
    try:
        receiving = dist.irecv(into, rank, group=group)
    except RuntimeError:
        raise LostError("the stage before was lost") from None
    _wait(receiving)


def _wait(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError:
        raise LostError("a stage beside this one was lost") from None
