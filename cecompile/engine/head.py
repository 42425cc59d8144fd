"""The model's own head, over hidden states that are already there."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

Readout = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Head = Callable[[Tensor], Tensor]


@dataclass
class _Output(ModelOutput):
    """Whatever some model's head looks for in what its decoder returns."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    router_logits: Any = None


class _GivenHiddenStates(nn.Module):
    """Stands where the decoder stands, and returns what it is given."""

    @property
    def decoder(self) -> "_GivenHiddenStates":
        """What OPT calls instead of the base model."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


def head_of(model: PreTrainedModel) -> Head:
    """A function from hidden states (n, width) to logits (n, vocabulary), float32.

    They come from the causal model's own `forward`, with its decoder replaced by the given hidden states in a shallow
    copy, so biases, scales and soft caps of the head are its own code.
    """
    head = copy.copy(model)
    head._modules = dict(model._modules)
    head._modules[model.base_model_prefix] = _GivenHiddenStates()

    def logits(hidden: Tensor) -> Tensor:
        found: Tensor = head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()
        return found

    return logits


def readout_of(model: PreTrainedModel) -> Readout:
    """A function from hidden states (n, width) and targets (n, k) to their log-probabilities and the argmax (n,).

    Log-probabilities of the logits of `head_of`, float32, natural logarithm; the argmax is int32, the first of equals.
    """
    head = head_of(model)

    def readout(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        highest, argmax = logits.max(dim=1, keepdim=True)
        normaliser = highest + (logits - highest).exp().sum(dim=1, keepdim=True).log()
        return logits.gather(1, target.long()) - normaliser, argmax[:, 0].int()

    return readout
