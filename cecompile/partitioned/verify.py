"""The check of `engine.verify` for a model whose layers are not all in one place."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.engine.forward import Engine
from cecompile.engine.reference import AllLogits, as_batch, rounding
from cecompile.engine.verify import ROUNDED, Expected, Got, as_stock, distance, expectation, picked_of
from cecompile.partitioned.layer_feed import LayerFeed
from cecompile.partitioned.pipeline import Stage
from cecompile.partitioned.stations import LayerwiseModel
from cecompile.partitioned.streaming import StreamingEngine
from cecompile.workload.sequences import Ints, Sequences
from cecompile.workload.stage import StagedPass


@torch.inference_mode()
def sweep_disagreement(
    engine: StreamingEngine, model: PreTrainedModel, stock: str, sequences: Sequences, staged: Sequence[StagedPass]
) -> float:
    """The `disagreement` of a streaming engine; the stock layers, too, run in one sweep over all sequences."""
    picked = picked_of(engine.run, sequences, staged)
    run = functools.partial(stock_sweep, model, engine.stations, engine.feed)
    with as_stock(model, stock):
        expected, few = _expected(sequences, _logits(run, sequences, picked)), list(picked[0])[:ROUNDED]
        return distance(model, sequences, picked, lambda: rounding(model, sequences, few, run), expected)


def _logits(run: AllLogits, sequences: Sequences, picked: Sequence[Got]) -> dict[int, Tensor]:
    """The stock model's logits of all sequences that were picked from passes, by sequence."""
    which = sorted({i for ours in picked for i in ours})
    logits = run([sequences.inputs(i) for i in which], [int(sequences.predicted[i]) for i in which])
    return dict(zip(which, logits, strict=True))


def _expected(sequences: Sequences, logits: Mapping[int, Tensor]) -> Expected:
    return {i: expectation(sequences, i, one) for i, one in logits.items()}


def stock_sweep(
    model: PreTrainedModel, stations: LayerwiseModel, feed: LayerFeed, inputs: Sequence[Ints], last: Sequence[int]
) -> list[Tensor]:
    """The stock model's logits at the `last` tokens of each input, (last, vocabulary) float32.

    Each layer is the model's own, called with the weights from the feed.
    """
    tokens = [as_batch(model, one) for one in inputs]
    feed.rewind()
    with stations.open():
        hidden = [stations.begin(one) for one in tokens]
        for place, layer in enumerate(stations.layers):
            held = dict(layer.named_buffers()) | feed.layout.views(feed.places[feed.take()])
            held = {name: tensor.to(model.device) for name, tensor in held.items()}

            def through(*args: Any, layer: nn.Module = layer, held: dict[str, Tensor] = held, **named: Any) -> Any:
                return torch.func.functional_call(layer, held, args, named)

            hidden = [stations.step(place, through, one, h) for one, h in zip(tokens, hidden, strict=True)]
            feed.give_back()
        return [stations.logits(one, h)[0, -n:].float() for one, h, n in zip(tokens, hidden, last, strict=True)]


@torch.inference_mode()
def pipeline_disagreement(
    engine: Engine, stage: Stage, model: PreTrainedModel, stock: str, sequences: Sequences,
    staged: Sequence[StagedPass],
) -> float | None:  # fmt: skip
    """The `disagreement` of a stage's engine, through all stages of the pipeline, each of which calls this function.

    Returns:
        0 from all stages but the last, which alone has logits to compare. None from a stage with too little memory.
    """
    picked = picked_of(engine.run, sequences, staged)

    def run(inputs: Sequence[Ints], last: Sequence[int]) -> list[Tensor]:
        return [stage.alone(as_batch(model, one))[0, -n:].float() for one, n in zip(inputs, last, strict=True)]

    with as_stock(model, stock):
        stage.suffices = True
        logits = _logits(run, sequences, picked)
        rounded = rounding(model, sequences, list(picked[0])[:ROUNDED], run)  # always: all stages must take part
        if not stage.suffices:
            return None
        if not stage.ends:
            return 0.0
        return distance(model, sequences, picked, lambda: rounded, _expected(sequences, logits))
