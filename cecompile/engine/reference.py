"""The reference: each choice alone, unpadded, through the stock model with stock attention.

The reference shares no tree, packing or attention code with the other engines, which are checked against it.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cecompile.workload.sequences import Ints, Sequences

SPREADLESS = 1e-4  # of the values: counts as the standard deviation of values that are all equal
ROUNDED, READ = 256, 8  # `rounding` runs a sequence's first 256 tokens, and compares the logits of the last 8

AllLogits = Callable[[Sequence[Ints], Sequence[int]], list[Tensor]]  # see `last_logits`, of a given model


@torch.inference_mode()
def stock_logits(model: PreTrainedModel, sequences: Sequences, i: int) -> Tensor:
    """The stock model's logits where sequence `i` predicts its tokens: (predicted, vocabulary), float32."""
    return last_logits(model, [sequences.inputs(i)], [int(sequences.predicted[i])])[0]


def last_logits(model: PreTrainedModel, inputs: Sequence[Ints], last: Sequence[int]) -> list[Tensor]:
    """The logits at the `last` tokens of each input, (last, vocabulary) float32; runs one input after another."""
    return [
        model(input_ids=as_batch(model, one), use_cache=False).logits[0, -n:].float()
        for one, n in zip(inputs, last, strict=True)
    ]


def as_batch(model: PreTrainedModel, tokens: Ints) -> Tensor:
    """Tokens (n,) as a batch of one row on the model's device, (1, n) int64."""
    return torch.from_numpy(tokens.astype(np.int64)).to(model.device)[None]


@torch.inference_mode()
def rounding(
    model: PreTrainedModel, sequences: Sequences, which: Iterable[int], all_logits: AllLogits | None = None
) -> float:
    """The distance that rounding alone moves the stock model's logits; 0 for a model with one attention implementation.

    The model's own attention is compared with another of the same arithmetic: "eager", or "sdpa" where the own is
    "eager". The distance is the root mean square of the differences, in standard deviations of the logits.

    `all_logits` runs the model on the sequences `which`; None runs the whole model, one sequence after another.
    """
    own = model.config._attn_implementation
    other = "eager" if own != "eager" else "sdpa"
    run = all_logits or functools.partial(last_logits, model)
    beginnings = [sequences.inputs(i)[:ROUNDED] for i in which]  # eager attention's memory grows as their square
    expected = run(beginnings, [READ] * len(beginnings))
    try:
        model.set_attn_implementation(other)
        got = run(beginnings, [READ] * len(beginnings))
    except ValueError:  # the model has no other
        return 0.0
    finally:
        model.set_attn_implementation(own)
    found = relative_distance(torch.cat(got), torch.cat(expected))
    return found if math.isfinite(found) else 0.0


def relative_distance(got: Tensor, expected: Tensor) -> float:
    """The root mean square of the differences, in standard deviations of the expected values.

    Minus infinity on both sides does not count: a head may rule tokens out. Infinite where only one side is finite.
    """
    pairs = got[got != expected], expected[got != expected]
    if not all(side.isfinite().all() for side in pairs):
        return math.nan if any(side.isnan().any() for side in pairs) else math.inf
    finite = expected[expected.isfinite()]
    difference = (pairs[0] - pairs[1]).square().sum().item() / max(1, len(finite))
    if difference == 0:
        return 0.0
    return difference**0.5 / spread(finite)


def spread(values: Tensor) -> float:
    """The standard deviation by which differences are measured, more than 0; NaN where there are no numbers."""
    if not values.numel():
        return math.nan
    return max(values.std(correction=0).item(), SPREADLESS * values.abs().max().item()) or 1.0


@torch.inference_mode()
def score_alone(model: PreTrainedModel, sequences: Sequences, i: int) -> tuple[float, bool]:
    """The loglikelihood (natural) of sequence `i`'s predicted tokens, and whether all of them are the argmax."""
    target = torch.from_numpy(sequences.targets(i).astype(np.int64)).to(model.device)
    logits = stock_logits(model, sequences, i)
    logprobs = torch.log_softmax(logits, dim=-1)
    loglikelihood: float = logprobs.gather(1, target[:, None]).double().sum().item()
    return loglikelihood, bool((logits.argmax(dim=-1) == target).all())


def score_one_by_one(model: PreTrainedModel, sequences: Sequences) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The results of `score_alone` for all n sequences, (n,) float64 and (n,) bool, by a stock model."""
    scores = [score_alone(model, sequences, i) for i in range(len(sequences))]
    return np.array([s[0] for s in scores]), np.array([s[1] for s in scores], dtype=bool)
