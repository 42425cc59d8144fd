"""A check before any score is trusted: the warm engine must agree with the stock model.

Compilers have bugs, and a wrong score looks like any other. So the stock model scores a few sequences of one real pass
per bucket again, one by one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from cecompile.engine.attention import stock_attention
from cecompile.engine.buffers import Readouts
from cecompile.engine.decode import Decoder
from cecompile.engine.probe import ROUNDINGS, TOLERANCE
from cecompile.engine.reference import rounding, spread, stock_logits
from cecompile.workload.decode_schedule import Step
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass

# without cuDNN, which plans each length anew, in more time than one run takes
_PLANNED_FOR_NO_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CHECKED = 4  # sequences per pass
ROUNDED = 2  # sequences on which `rounding` is measured

Run = Callable[[Iterable[StagedPass]], list[Readouts]]  # an engine's `run`
Got = Mapping[int, NDArray[np.float32]]  # by sequence, log-probabilities of its last tokens
Expected = MutableMapping[int, tuple[Tensor, float]]  # by sequence, see `expectation`


@torch.inference_mode()
def disagreement(
    run: Run, model: PreTrainedModel, stock: str, sequences: Sequences, staged: Sequence[StagedPass],
    expected: Expected | None = None,
) -> float:  # fmt: skip
    """The distance of a warm engine from the stock model, as a multiple of the tolerance; up to 1 is fine.

    The distance is the root mean square of the log-probabilities' differences, in standard deviations of the logits.
    The tolerance is TOLERANCE, or ROUNDINGS times the model's `rounding` if larger. Where the model's logits are not
    finite the distance is 0.

    Args:
        run: the engine's.
        stock: the model's own attention implementation.
        staged: the passes of all `sequences`, of which the first of each bucket is run.
        expected: see `distance`.
    """
    picked = picked_of(run, sequences, staged)
    with as_stock(model, stock):
        few = list(picked[0])[:ROUNDED]
        return distance(model, sequences, picked, lambda: rounding(model, sequences, few), expected)


@torch.inference_mode()
def decoding_disagreement(
    decoder: Decoder, model: PreTrainedModel, stock: str, sequences: Sequences, expected: Expected | None = None
) -> float:
    """The `disagreement` of a decoder that reads a few sequences: all inputs but the last, then the last alone.

    The sequences are among the `expected` ones where there are any.
    """
    got: dict[int, NDArray[np.float32]] = {}
    decoder.clear()
    for i in _spread(np.array(sorted(expected or range(len(sequences)))), sequences):
        inputs, target = sequences.inputs(i), sequences.targets(i)[-1:]
        slots = np.arange(len(inputs), dtype=np.int32)
        size, none, zero = decoder.shape.step_tokens[0], np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int32)
        for at in range(0, len(inputs) - 1, size):
            part = slice(at, min(at + size, len(inputs) - 1))
            decoder.run(Step(inputs[part], slots[part], np.zeros_like(slots[part]), none, none, zero))
        got[i], _ = decoder.run(Step(inputs[-1:], slots[-1:], zero, zero, target, zero))
    with as_stock(model, stock):
        return distance(model, sequences, [got], lambda: rounding(model, sequences, got), expected)


@contextmanager
def as_stock(model: PreTrainedModel, stock: str) -> Iterator[None]:
    """Makes the model the stock model within this context, with its own attention implementation `stock`."""
    with stock_attention(model, stock), sdpa_kernel(_PLANNED_FOR_NO_LENGTH):
        yield


def picked_of(run: Run, sequences: Sequences, staged: Sequence[StagedPass]) -> list[Got]:
    """Runs the first pass of each bucket; returns each pass's log-probabilities, of a few sequences."""
    first = {one.bucket: one for one in reversed(staged)}.values()
    ran = zip(first, run(first), strict=True)
    return [{i: out.logprob[one.choice == i] for i in _spread(np.unique(one.choice), sequences)} for one, out in ran]


def _spread(among: NDArray[Any], sequences: Sequences) -> list[int]:
    """A few of the sequences `among`, from the shorter half: the warm engine leaves little memory."""
    lengths = sequences.input_lengths[among]
    short = among[lengths <= np.median(lengths)]
    return short[np.linspace(0, len(short) - 1, min(CHECKED, len(short))).astype(int)].tolist()


def expectation(sequences: Sequences, i: int, logits: Tensor) -> tuple[Tensor, float]:
    """What the stock model's logits say of sequence `i`: its tokens' log-probabilities, (predicted,) float32 on the
    CPU, and the `spread` of the logits."""
    target = torch.from_numpy(sequences.targets(i).astype(np.int64)).to(logits.device)
    logprob = logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
    return logprob.cpu(), spread(logits[~logits.isneginf()])  # a head may rule tokens out


def distance(
    model: PreTrainedModel, sequences: Sequences, picked: Iterable[Got], rounded: Callable[[], float],
    expected: Expected | None = None,
) -> float:  # fmt: skip
    """The `disagreement` of the worst pass.

    Args:
        picked: the log-probabilities of each pass.
        rounded: computes `rounding`; called only where TOLERANCE is exceeded.
        expected: by sequence. Those that are missing are computed here, one sequence at a time, and added.
    """
    tolerated, worst = TOLERANCE[model.dtype], 0.0
    expected = {} if expected is None else expected
    for got in picked:
        errors, spreads = [], []
        for i, ours in got.items():
            if i not in expected:
                expected[i] = expectation(sequences, i, stock_logits(model, sequences, i))
            logprob, logits_spread = expected[i]
            both = torch.from_numpy(ours), logprob[-len(ours) :]
            errors.append(torch.where(both[0] == both[1], 0.0, both[0] - both[1]))  # also where both are infinite
            spreads.append(logits_spread)
        error = torch.cat(errors).square().mean().sqrt().item()
        if np.isfinite(spreads).all() and error > 0:
            worst = max(worst, error / max(spreads))
    if worst > tolerated:
        tolerated = max(tolerated, ROUNDINGS * rounded())
    return worst / tolerated
