"""Pipeline parallelism: a model's layers on several devices, one after another.

Each stage has some of the decoder layers. Passes are the micro-batches. Every stage makes the same plan, so only hidden
states go from stage to stage. Passes come from a counter that all replicas share, and the pipeline drains once, at the
end of a run. The schedules of `torch.distributed.pipelining` drain after a fixed number of micro-batches and keep every
output until then, so `isend` and `irecv` are used directly.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from cecompile.device import is_out_of_memory
from cecompile.engine.head import head_of
from cecompile.engine.parts import Part
from cecompile.errors import CheckError
from cecompile.model.structure import LayerRange
from cecompile.partitioned.span import Span


class LostError(CheckError):
    """A neighbouring stage is gone."""


@dataclass(frozen=True, slots=True)
class Place:
    """This process's neighbours in a pipeline: each a rank and the process group of the pair; None at an end."""

    before: tuple[int, Any] | None
    after: tuple[int, Any] | None


def places(stages: int, rank: int, size: int, own_device: bool) -> Place:
    """Connects every stage with the next, in each replica; all ranks call this function.

    Args:
        stages: of a replica, whose ranks are consecutive; divides `size`.
        rank, size: of the default process group.
        own_device: each rank has a CUDA device of its own, so NCCL connects the ranks; otherwise Gloo does.
    """
    lefts = [left for left in range(size - 1) if (left + 1) % stages]  # all ranks but the last of each replica
    groups = {left: dist.new_group([left, left + 1], backend="nccl" if own_device else "gloo") for left in lefts}
    before = (rank - 1, groups[rank - 1]) if rank - 1 in groups else None
    after = (rank + 1, groups[rank]) if rank in groups else None
    return Place(before, after)


class Stage(Part):
    """The part of a model that is one stage of a pipeline.

    The model has the weights of `share` on its device; the other layers leave the model for good. `suffices` is False
    once memory did not suffice for a sequence `alone`.
    """

    suffices = True

    def __init__(self, model: PreTrainedModel, share: LayerRange, place: Place) -> None:
        self._span = Span(model, share)
        self.ends = self._span.ends
        self._head = head_of(model) if self.ends else None
        self._device, self._dtype = model.device, model.dtype
        self._from = None if place.before is None else _Wire(*place.before, model.device)
        self._to = None if place.after is None else _Wire(*place.after, model.device)
        self._come = self._made = torch.empty(0)
        self._leaving: list[tuple[Tensor, Any]] = []

    @torch.inference_mode()
    def reserve(self, slots: int) -> None:
        for _, sending in self._leaving:
            _wait(sending)
        size = slots * self._span.width
        if not self._span.begins:
            self._come = torch.zeros(size, dtype=self._dtype, device=self._device)
        if not self.ends:
            assert self._to is not None
            self._made = torch.zeros(size, dtype=self._dtype, device=self._device)
            self._leaving = [(self._to.buffer(size, self._dtype), None) for _ in range(2)]

    def __call__(self, token_ids: Tensor, **arguments: Any) -> Tensor:
        hidden = self._span(token_ids, self._states(self._come, token_ids.shape), **arguments)
        if not self.ends:
            self._states(self._made, token_ids.shape).copy_(hidden)
        return hidden

    def trial(self, token_ids: Tensor) -> Tensor:
        shape = (*token_ids.shape, self._span.width)
        return self._span(token_ids, torch.zeros(shape, dtype=self._dtype, device=self._device))

    @torch.inference_mode()
    def receive(self, shape: Sequence[int]) -> None:
        if self._from is not None:
            self._from.receive(self._states(self._come, shape).view(-1))

    @torch.inference_mode()
    def send(self, shape: Sequence[int]) -> None:
        """See `Part`. The hidden states may be overwritten as soon as this method returns."""
        if self._to is None:
            return
        buffer, sending = self._leaving.pop(0)
        _wait(sending)
        made = self._states(self._made, shape).view(-1)
        self._leaving.append((buffer, self._to.send(made, buffer[: len(made)])))

    @torch.inference_mode()
    def alone(self, token_ids: Tensor) -> Tensor:
        """Runs one sequence, (1, n) int64, through all stages, each of which calls this method.

        A stage that runs out of memory still sends: the next stage waits for its hidden states.

        Returns:
            The logits, (1, n, vocabulary) float32, in the last stage; zeros of (1, n, 1) in the others.
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
        """The beginning of a buffer as hidden states, (rows, length, width); an empty buffer as it is."""
        rows, length, width = *shape, self._span.width
        return buffer[: rows * length * width].view(rows, length, width) if len(buffer) else buffer


class _Wire:
    """Sends to and receives from another rank; through pinned memory for Gloo, which cannot read CUDA memory."""

    def __init__(self, rank: int, group: Any, device: torch.device) -> None:
        self._rank, self._group = rank, group
        self._through_host = device.type == "cuda" and dist.get_backend(group) == "gloo"
        self._device = torch.device("cpu") if self._through_host else device
        self._arrival = torch.empty(0)

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """A buffer to `send` from."""
        return torch.zeros(size, dtype=dtype, device=self._device, pin_memory=self._through_host)

    def send(self, values: Tensor, buffer: Tensor) -> Any:
        """Sends `values` by way of `buffer`, which is free again after the `wait` of the returned work."""
        buffer.copy_(values)
        with _noticing_loss():
            return dist.isend(buffer, self._rank, group=self._group)

    def receive(self, into: Tensor) -> None:
        """Waits until the values received fill `into`."""
        arrived = into
        if self._through_host:
            if len(self._arrival) < len(into):
                self._arrival = self.buffer(len(into), into.dtype)
            arrived = self._arrival[: len(into)]
        with _noticing_loss():
            _wait(dist.irecv(arrived, self._rank, group=self._group))
        if self._through_host:
            into.copy_(arrived)


def _wait(sending: Any) -> None:
    if sending is not None:
        with _noticing_loss():
            sending.wait()


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise LostError("a neighbouring stage was lost") from None
