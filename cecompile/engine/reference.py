"""The reference: each choice alone, unpadded, through the stock model with stock attention.

It shares none of the tree, packing or attention code, so that the other engines can be checked against it.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cecompile.workload.sequences import Sequences


@torch.inference_mode()
def stock_logits(model: PreTrainedModel, sequences: Sequences, i: int) -> Tensor:
    """The stock model's logits where sequence `i` predicts its tokens: (predicted, vocabulary), float32."""
    input_ids = torch.from_numpy(sequences.inputs(i).astype(np.int64)).to(model.device)
    return model(input_ids=input_ids[None], use_cache=False).logits[0, -int(sequences.predicted[i]) :].float()


@torch.inference_mode()
def rounding(model: PreTrainedModel, sequences: Sequences, which: Iterable[int]) -> float:
    """How far rounding alone moves the stock model's logits: 0 where it has one attention implementation only.

    That is the root mean square of what they differ by between two of its own implementations of the same arithmetic,
    "eager" and the one it is loaded with, in standard deviations of the logits. One rounding that differs at the first
    layer makes all later ones differ.
    """
    own = model.config._attn_implementation
    other = "eager" if own != "eager" else "sdpa"
    expected = [stock_logits(model, sequences, i) for i in which]
    try:
        model.set_attn_implementation(other)
        got = [stock_logits(model, sequences, i) for i in which]
    except ValueError:  # it has none
        return 0.0
    finally:
        model.set_attn_implementation(own)
    difference = torch.cat([a - b for a, b in zip(got, expected, strict=True)])
    return (difference.square().mean().sqrt() / torch.cat(expected).std()).item()


@torch.inference_mode()
def score_one_by_one(
    model: PreTrainedModel, sequences: Sequences, done: Callable[[int], None] = lambda _: None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Per sequence, the loglikelihood of its readouts (natural logarithm) and whether each is the argmax.

    Args:
        model: a stock causal model in evaluation mode.
        sequences: n sequences.
        done: called with each sequence's index when it is scored.

    Returns:
        (n,) float64 and (n,) bool.
    """
    loglikelihood = np.zeros(len(sequences), dtype=np.float64)
    greedy = np.zeros(len(sequences), dtype=bool)
    for i in range(len(sequences)):
        target = torch.from_numpy(sequences.targets(i).astype(np.int64)).to(model.device)
        logits = stock_logits(model, sequences, i)
        logprobs = torch.log_softmax(logits, dim=-1)
        loglikelihood[i] = logprobs.gather(1, target[:, None]).double().sum().item()
        greedy[i] = bool((logits.argmax(dim=-1) == target).all())
        done(i)
    return loglikelihood, greedy
