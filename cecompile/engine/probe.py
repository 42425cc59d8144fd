"""A check before anything is compiled: this model must compute trees exactly on this device."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cecompile.device import is_out_of_memory
from cecompile.engine.attention import TreeMasks, attention_before, install
from cecompile.engine.reference import relative_distance, rounding, stock_logits
from cecompile.errors import CheckError, UserError, first_line
from cecompile.model.support import refusal
from cecompile.workload.plan import BLOCK, Geometry, make_plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import stage_all, views
from cecompile.workload.tree import TARGETS

# Root mean square of the logits' differences, in standard deviations of the logits. Rounding alone gave up to 0.06 in
# bfloat16, over 32 random layers of width 4,096; a wrong mask gives about 1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.02}
ROUNDINGS = 3  # tolerated where larger: so many times the difference that rounding alone makes in the model


def choose_attention(model: PreTrainedModel, wanted: str) -> tuple[str, str | None]:
    """The attention implementation to use, checked against the stock model.

    Args:
        model: on its device, as loaded.
        wanted: "flex", "sdpa", or "auto": flex on CUDA where it compiles and agrees, else sdpa.

    Returns:
        "flex" or "sdpa", and the reason where the first choice was rejected, else None.

    Raises:
        UserError: no wanted implementation computes this model exactly.
        CheckError: the stock model's logits are not numbers.
    """
    candidates = [wanted] if wanted != "auto" else (["flex", "sdpa"] if model.device.type == "cuda" else ["sdpa"])
    reasons: list[str] = []
    for attention in candidates:
        problem = _problem(model, attention)
        if problem is None:
            return attention, "; ".join(reasons) or None
        reasons.append(f"{attention}: {problem}")
    name, why = type(model).__name__, "; ".join(reasons)
    raise UserError(f"{name}: cannot be scored as trees ({why}); --engine reference scores it")


def _problem(model: PreTrainedModel, attention: str) -> str | None:
    """The reason why a small tree's logits differ from the stock model's; None where the logits agree."""
    if known := refusal(model):
        return known
    sequences = _small_tree(model.config.get_text_config().vocab_size)
    stock = attention_before(model)
    try:
        install(model, attention)
        got = _tree_logits(model, sequences, blocks=attention == "flex")
    except Exception as error:  # a compiler, driver or model may raise anything; any failure means no
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        model.set_attn_implementation(stock)
    every = range(len(sequences))
    expected = torch.cat([stock_logits(model, sequences, i) for i in every])
    if (expected.isnan() | expected.isposinf()).any():
        raise CheckError(f"{type(model).__name__}: the stock model's logits are not numbers; no result was written")
    difference = relative_distance(got, expected)
    if difference <= TOLERANCE[model.dtype] or difference <= ROUNDINGS * rounding(model, sequences, every):
        return None
    return f"logits differ by {difference:.2g} of their standard deviation"


def _small_tree(vocabulary: int) -> Sequences:
    """Three branches of 8, 9 and 10 tokens on a trunk of 24."""
    random = np.random.default_rng(0)
    trunk = random.integers(0, vocabulary, 24)
    parts = [np.concatenate([trunk, random.integers(0, vocabulary, n)]) for n in (9, 10, 11)]
    return Sequences.of(parts, predicted=[9, 10, 11], questions=[0, 0, 0])


@torch.inference_mode()
def _tree_logits(model: PreTrainedModel, sequences: Sequences, blocks: bool) -> Tensor:
    plan = make_plan(sequences, Geometry(rows=1, length=BLOCK, readout_chunk=1, blocks=blocks))
    (one,) = stage_all(plan)
    part = views(torch.from_numpy(one.data).to(model.device), plan.buckets[one.bucket], blocks)
    with TreeMasks(part).active() as masks:
        given = {"input_ids": part["token_ids"].long(), "position_ids": part["depth"].long(), **masks.arguments(model)}
        logits = model(**given, use_cache=False).logits
    by_choice = np.argsort(one.choice, kind="stable")
    node = part["position"][torch.from_numpy(one.entry[by_choice] // TARGETS).to(model.device)]
    return logits[0].index_select(0, node).float()
