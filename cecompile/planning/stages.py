"""The division of a model's layers among the stages of a pipeline."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from cecompile.model.structure import LayerRange, decoder_layers, on_meta
from cecompile.planning.sizes import experts_used, matrix_parameters

Fits = Callable[[int, int, int], bool]  # (stage, first, end): whether the stage holds the layers from first to end


def split(layers: Sequence[float], stages: int, last: float = 0.0, fits: Fits = lambda *_: True) -> list[int] | None:
    """Divides layers among stages so that the slowest stage is as fast as possible.

    `layers` gives the cost of each layer, and `last` the cost of the last stage's head.

    Returns:
        The layer before which each stage ends: `stages` increasing numbers, the last of which is the number of layers.
        None where nothing fits.
    """
    count = len(layers)
    sums = [0.0, *accumulate(layers)]
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by layers given out: the slowest stage, and the ends
    for stage in range(stages):
        extra = last if stage == stages - 1 else 0.0
        nearer: dict[int, tuple[float, list[int]]] = {}
        for first, (slowest, ends) in best.items():
            for end in range(first + 1, count + 1):
                found = max(slowest, sums[end] - sums[first] + extra)
                if (end not in nearer or found < nearer[end][0]) and fits(stage, first, end):
                    nearer[end] = found, [*ends, end]
        best = nearer
    return best[count][1] if count in best else None


def costs(config: Any) -> tuple[list[float], float]:
    """Costs for `split`: weights per token in each layer of a model, and weights per readout in the head.

    Raises:
        UserError: transformers cannot build a causal model from the configuration.
    """
    model = on_meta(config)
    used = experts_used(config.get_text_config())
    layers = [float(matrix_parameters(layer, used)) for layer in decoder_layers(model)]
    return layers, float(model.get_output_embeddings().weight.numel())


def shares(ends: Sequence[int]) -> list[LayerRange]:
    """The part of a model that each stage holds, where its layers are divided at `ends`."""
    pairs, count = pairwise([0, *ends]), ends[-1]
    return [LayerRange(first, end, count, with_embedding=first == 0, with_head=end == count) for first, end in pairs]
