"""The model's own head, applied to given hidden states."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Readout = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Head = Callable[[Tensor], Tensor]

PART = 256  # logits


class _Output:
    """Hidden states in the form of a decoder's output. Any other attribute that a model's head looks for is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class _GivenHiddenStates(nn.Module):
    """Replaces the decoder, and returns the given embeddings as the hidden states."""

    @property
    def decoder(self) -> "_GivenHiddenStates":
        """This module: OPT calls its decoder instead of the base model."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(inputs_embeds)


def head_of(model: PreTrainedModel) -> Head:
    """A function from hidden states (n, width) to logits (n, vocabulary), float32.

    The logits come from the causal model's own `forward`, in a shallow copy whose decoder returns the given hidden
    states. So the model's own code applies the head's biases, scales and soft caps.
    """
    head = copy.copy(model)
    head._modules = dict(model._modules)
    head._modules[model.base_model_prefix] = _GivenHiddenStates()

    def logits(hidden: Tensor) -> Tensor:
        return head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    return logits


def readout_of(model: PreTrainedModel) -> Readout:
    """A function from hidden states (n, width) and targets (n, k) to log-probabilities (n, k) and the argmax (n,).

    Log-probabilities are the targets', float32 and natural. The argmax is int32, the first of equals.
    """
    head, on_cpu = head_of(model), model.device.type == "cpu"

    def readout(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        highest, argmax = max_by_parts(logits) if on_cpu else logits.max(dim=1, keepdim=True)
        normaliser = highest + (logits - highest).exp().sum(dim=1, keepdim=True).log()
        return logits.gather(1, target.long()) - normaliser, argmax[:, 0].int()

    return readout


def max_by_parts(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row of (n, m), and the maximum's first index, both (n, 1).

    Compiled for a CPU, finding a maximum's index takes three times as long as finding the maximum. So the maximum is
    found over the whole row, in parts, and the index within one part.
    """
    size = logits.shape[1]
    width = min(PART, size)
    whole = size // width * width
    parts = [logits[:, :whole].unflatten(1, (-1, width)).amax(dim=2)]
    if whole < size:
        parts.append(logits[:, whole:].amax(dim=1, keepdim=True))
    highest, part = torch.cat(parts, dim=1).max(dim=1, keepdim=True)
    columns = (part * width + torch.arange(width, device=logits.device)).clamp(max=size - 1)
    first = logits.gather(1, columns).argmax(dim=1, keepdim=True)
    return highest, columns.gather(1, first)
