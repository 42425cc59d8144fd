"""The reference: each choice alone, unpadded, through the stock model with stock attention.

It shares none of the tree, packing or attention code, so that the other engines can be checked against it.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cecompile.workload.sequences import Ints, Sequences

ROUNDED, READ = 256, 8  # tokens of a sequence, and of the last how many the logits, that show what rounding does

AllLogits = Callable[[Sequence[Ints], Sequence[int]], list[Tensor]]  # of inputs, those of their last so many tokens


@torch.inference_mode()
def stock_logits(model: PreTrainedModel, sequences: Sequences, i: int) -> Tensor:
    """The stock model's logits where sequence `i` predicts its tokens: (predicted, vocabulary), float32."""
    return _logits(model, sequences.inputs(i), int(sequences.predicted[i]))


def _logits(model: PreTrainedModel, tokens: Ints, last: int) -> Tensor:
    """(last, vocabulary), float32: those of the `last` of some tokens."""
    input_ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    return model(input_ids=input_ids[None], use_cache=False).logits[0, -last:].float()


@torch.inference_mode()
def rounding(
    model: PreTrainedModel, sequences: Sequences, which: Iterable[int], all_logits: AllLogits | None = None
) -> float:
    """How far rounding alone moves the stock model's logits: 0 where it has one attention implementation only.

    That is the root mean square of what they differ by between two of its own implementations of the same arithmetic,
    "eager" and the one it is loaded with, in standard deviations of the logits. One rounding that differs at the first
    layer makes all later ones differ. `all_logits` is how the model is run; by default whole, one by one.
    """
    own = model.config._attn_implementation
    other = "eager" if own != "eager" else "sdpa"

    run = all_logits or (
        lambda inputs, last: [_logits(model, tokens, n) for tokens, n in zip(inputs, last, strict=True)]
    )
    beginnings = [sequences.inputs(i)[:ROUNDED] for i in which]  # eager attention holds a matrix of tokens
    expected = run(beginnings, [READ] * len(beginnings))
    try:
        model.set_attn_implementation(other)
        got = run(beginnings, [READ] * len(beginnings))
    except ValueError:  # it has none
        return 0.0
    finally:
        model.set_attn_implementation(own)
    difference = torch.cat([a - b for a, b in zip(got, expected, strict=True)])
    return (difference.square().mean().sqrt() / torch.cat(expected).std()).item()


@torch.inference_mode()
def score_alone(model: PreTrainedModel, sequences: Sequences, i: int) -> tuple[float, bool]:
    """The loglikelihood of sequence `i`'s readouts (natural logarithm), and whether each is the argmax."""
    target = torch.from_numpy(sequences.targets(i).astype(np.int64)).to(model.device)
    logits = stock_logits(model, sequences, i)
    logprobs = torch.log_softmax(logits, dim=-1)
    loglikelihood: float = logprobs.gather(1, target[:, None]).double().sum().item()
    return loglikelihood, bool((logits.argmax(dim=-1) == target).all())


def score_one_by_one(model: PreTrainedModel, sequences: Sequences) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`score_alone` for all of n sequences: (n,) float64 and (n,) bool. `model`: a stock one in evaluation mode."""
    scores = [score_alone(model, sequences, i) for i in range(len(sequences))]
    return np.array([s[0] for s in scores]), np.array([s[1] for s in scores], dtype=bool)
