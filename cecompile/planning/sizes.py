"""Counts of a model's weights and of its arithmetic, made before anything is loaded."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cecompile.model.layer_layout import layer_layout
from cecompile.model.structure import LayerRange, decoder_layers, kinds_of, on_meta

RECEIVED, SENT = 1, 3  # a stage's buffers: one is received into; one is filled while two are on their way


@dataclass(frozen=True, slots=True)
class Sizes:
    """Counts that decide a model's memory and speed.

    For a stage, `parameters` and `vocabulary` are the stage's own; the other counts are the whole model's.
    """

    parameters: int  # number of weights, each tied weight counted once
    layers: int  # decoder layers
    layer_parameters: int  # weights in the matrices of all decoder layers
    active_parameters: int  # as `layer_parameters`, but only the weights that one token is multiplied with
    width: int  # values of a hidden state
    inner: int  # values of a hidden state within the MLP
    vocabulary: int  # logits of a token; 0 without a head
    cached: int  # values of keys and values per token, over all layers
    groups: int  # queries' heads per keys' head
    key_cost: float  # arithmetic of a token looking at one more key, relative to all weights in decoder layers
    itemsize: int  # bytes of a weight and of an activation
    states: int = 0  # buffers of hidden states received from or sent to other stages


@dataclass(frozen=True, slots=True)
class Streamed:
    """Counts of streamed layers, each of `layer_bytes` on the device, with `passes` under way at once."""

    layers: int
    layer_bytes: int
    passes: int = 1


def streamed_sizes(config: Any, itemsize: int) -> Streamed:
    """Counts a model's layers, in values of `itemsize` bytes. Raises UserError where the layers cannot be streamed."""
    model = on_meta(config)
    layout = layer_layout(model)
    kinds_of(model)  # refuses a model of too many kinds
    return Streamed(len(decoder_layers(model)), layout.size // layout.dtype.itemsize * itemsize)


def model_sizes(config: Any, dtype: str, share: LayerRange | None = None) -> Sizes:
    """Counts a model on the meta device: no weight is loaded or allocated.

    Args:
        dtype: "auto" (the configuration's), "float32", "bfloat16" or "float16".
        share: the weights that a stage holds; None is the whole model.

    Raises:
        UserError: transformers cannot build a causal model from the configuration.
    """
    model = on_meta(config)
    text = config.get_text_config()
    width, heads, depth = text.hidden_size, text.num_attention_heads, text.num_hidden_layers
    inner = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    kept = getattr(text, "num_key_value_heads", None) or heads
    head_size = key_size = value_size = getattr(text, "head_dim", None) or width // heads
    if getattr(text, "kv_lora_rank", None):
        key_size, value_size = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    resolved = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    absent = set() if share is None else share.absent(model)
    layers, used = decoder_layers(model), experts_used(text)
    inside = sum(p.numel() for layer in layers for p in layer.parameters())
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters() if id(p) not in absent),
        layers=len(layers),
        layer_parameters=sum(matrix_parameters(layer) for layer in layers),
        active_parameters=sum(matrix_parameters(layer, used) for layer in layers),
        width=width,
        inner=next((n for n in inner if n), 4 * width),
        vocabulary=text.vocab_size if share is None or share.with_head else 0,
        cached=depth * kept * (key_size + value_size),
        groups=heads // kept,
        key_cost=2 * depth * heads * head_size / max(1, inside),
        itemsize=resolved.itemsize,
        states=0 if share is None else RECEIVED * (share.first > 0) + SENT * (share.last < share.layers),
    )


class StageSizes:
    """The `Sizes` of any stage of a pipeline of at least two stages; each kind of stage is counted once."""

    def __init__(self, config: Any, dtype: str, stages: int) -> None:
        self._layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(on_meta(config))]
        count = len(self._layers)
        between = LayerRange(1, 2, count, with_embedding=False, with_head=False)
        self._shares = [LayerRange(0, 1, count, with_head=False)] + (stages - 2) * [between]
        self._shares.append(LayerRange(count - 1, count, count, with_embedding=False))
        self._sizes = {share: model_sizes(config, dtype, share) for share in set(self._shares)}

    def of(self, stage: int, first: int, last: int) -> Sizes:
        """Sizes of a stage that holds the layers from `first` to before `last`."""
        share = self._shares[stage]  # with one layer
        more = sum(self._layers[first:last]) - self._layers[share.first]
        return replace(self._sizes[share], parameters=self._sizes[share].parameters + more)


def matrix_parameters(layer: nn.Module, used: float = 1.0) -> int:
    """Weights in a layer's matrices, also GPT-2's Conv1D and stacked experts; of experts only the share `used`."""
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.dim() > 1}
    return sum(round(n * used) if "experts" in name.split(".") else n for name, n in sizes.items())


def experts_used(config: Any) -> float:
    """The share of the experts that a token is given to; 1 without experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    return getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
