"""The reference: each choice alone, unpadded, through the stock model with stock attention.

It shares none of the tree, packing or attention code, so that the other engines can be checked against it.
"""

from collections.abc import Callable

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
