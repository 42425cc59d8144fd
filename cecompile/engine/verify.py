"""A check before any score is trusted: does the warm engine compute what the stock model computes?

Compilers have bugs, and a wrong score looks like any other. So of one real pass of each bucket a few sequences are
scored again, one by one, by the stock model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from cecompile.engine.forward import Engine, Readouts
from cecompile.engine.probe import TOLERANCE
from cecompile.engine.reference import stock_logits
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass

CHECKED = 4  # sequences of a pass


@torch.inference_mode()
def disagreement(
    engine: Engine, model: PreTrainedModel, stock: str, sequences: Sequences, staged: Sequence[StagedPass]
) -> float:
    """How far a warm engine is from the stock model, over the tolerance of the model's dtype: fine up to 1.

    Measured is the root mean square of the log-probabilities' differences, in standard deviations of the logits. A
    model whose logits are not finite is not judged here: 0.

    Args:
        engine: warm.
        model: the engine's model.
        stock: the stock model's attention implementation.
        sequences: all sequences.
        staged: their passes, of which the first of each bucket is run.
    """
    first = {one.bucket: one for one in reversed(staged)}.values()
    got = engine.run(first)
    ours = model.config._attn_implementation
    model.set_attn_implementation(stock)
    try:
        with torch.compiler.set_stance("force_eager"):
            return max(_difference(model, sequences, one, out) for one, out in zip(first, got, strict=True))
    finally:
        model.set_attn_implementation(ours)


def _difference(model: PreTrainedModel, sequences: Sequences, one: StagedPass, out: Readouts) -> float:
    present = np.unique(one.choice)
    errors, spread = [], []
    for i in present[np.linspace(0, len(present) - 1, min(CHECKED, len(present))).astype(int)].tolist():
        logits = stock_logits(model, sequences, i)
        target = torch.from_numpy(sequences.targets(i).astype(np.int64)).to(logits.device)
        logprob = logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
        errors.append(torch.from_numpy(out.logprob[one.choice == i]) - logprob.cpu())
        spread.append(logits.std().item())
    if not np.isfinite(spread).all():
        return 0.0
    return torch.cat(errors).square().mean().sqrt().item() / max(spread) / TOLERANCE[model.dtype]
