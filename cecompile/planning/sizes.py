"""Counts of a model's weights and of what it computes, before it is loaded."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cecompile.model.layer_layout import layer_layout
from cecompile.model.structure import LayerRange, decoder_layers, kinds_of, on_meta

RECEIVED, SENT = 1, 3  # buffers for what comes; for what goes, one that is filled and two on their way


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model decides its memory.

    Attributes:
        parameters: number of weights, each tied one once.
        width, inner, vocabulary: of hidden states, of the MLP's hidden states, of the logits; 0 without a head.
        cached: values of keys and values per token, over all layers.
        groups: queries' heads per keys' head.
        key_cost: arithmetic of a token looking at one more key, in that of its decoder layers' weights.
        itemsize: bytes of a weight and of an activation.
        states: buffers of hidden states that come from or go to other parts of the model.
    """

    parameters: int
    width: int
    inner: int
    vocabulary: int
    cached: int
    groups: int
    key_cost: float
    itemsize: int
    states: int = 0


@dataclass(frozen=True, slots=True)
class Streamed:
    """What of a model takes memory whose layers are streamed.

    Attributes:
        layers: how many there are.
        layer_bytes: of each, as it lies on the device.
        passes: under way at once.
    """

    layers: int
    layer_bytes: int
    passes: int = 1


def streamed_sizes(config: Any, itemsize: int) -> Streamed:
    """Counts a model's layers, in values of `itemsize` bytes. Raises UserError: they cannot be streamed."""
    model = on_meta(config)
    layout = layer_layout(model)
    kinds_of(model)
    return Streamed(len(decoder_layers(model)), layout.size // layout.dtype.itemsize * itemsize)


def model_sizes(config: Any, dtype: str, share: LayerRange | None = None) -> Sizes:
    """Counts a model's parameters without making them.

    Args:
        config: of a causal model.
        dtype: "auto" (the configuration's), "float32", "bfloat16" or "float16".
        share: what of the model is held; None is all.
    """
    model = on_meta(config)
    text = config.get_text_config()
    width = text.hidden_size
    named = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    heads = text.num_attention_heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    resolved = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    absent = set() if share is None else share.absent(model)
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in absent)
    inside = sum(p.numel() for layer in decoder_layers(model) for p in layer.parameters())
    queries = text.num_hidden_layers * heads * (getattr(text, "head_dim", None) or width // heads)
    return Sizes(
        parameters=parameters,
        width=width,
        inner=next((n for n in named if n), 4 * width),
        vocabulary=text.vocab_size if share is None or share.with_head else 0,
        cached=text.num_hidden_layers * kept * _head_sizes(text),
        groups=heads // kept,
        key_cost=2 * queries / max(1, inside),
        itemsize=torch.empty(0, dtype=resolved).element_size(),
        states=0 if share is None else RECEIVED * (share.first > 0) + SENT * (share.last < share.layers),
    )


class StageSizes:
    """The `Sizes` of any stage of a pipeline, counted once.

    Args:
        config, dtype: see `model_sizes`.
        stages: how many, at least two.
    """

    def __init__(self, config: Any, dtype: str, stages: int) -> None:
        layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(on_meta(config))]
        count = len(layers)
        kinds = [LayerRange(0, 1, count, with_head=False), LayerRange(count - 1, count, count, with_embedding=False)]
        if stages > 2:
            kinds[1:1] = (stages - 2) * [LayerRange(1, 2, count, with_embedding=False, with_head=False)]
        sizes = {share: model_sizes(config, dtype, share) for share in dict.fromkeys(kinds)}
        self._layers = layers
        self._without = [replace(sizes[k], parameters=sizes[k].parameters - layers[k.first]) for k in kinds]

    def of(self, stage: int, first: int, last: int) -> Sizes:
        """A stage's, with the layers from `first` to before `last`."""
        one = self._without[stage]
        return replace(one, parameters=one.parameters + sum(self._layers[first:last]))


def _head_sizes(text: Any) -> int:
    """Values of one head's key and value together."""
    if getattr(text, "kv_lora_rank", None):
        return int(text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    return 2 * int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def matrices(layer: nn.Module, used: float = 1.0) -> dict[str, int]:
    """Parameters of a layer's linear layers (GPT-2's Conv1D and stacked experts too), by name; of experts the share
    that is `used`."""
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.dim() > 1}
    return {name: round(n * used) if "experts" in name.split(".") else n for name, n in sizes.items()}


def experts_used(config: Any) -> float:
    """The share of the experts that a token is given to; 1 without experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    return getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
