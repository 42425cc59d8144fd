"""What a stock model is made of: its decoder layers, the norms beside them, and which of them a process holds."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cecompile.errors import UserError, first_line

KINDS = 4  # of layers, most that are compiled one by one
_NUMBERS = {"layer_idx", "layer_id", "layer_index"}  # what tells layers of one kind apart


def on_meta(config: Any) -> PreTrainedModel:
    """The causal model of a configuration without memory for its weights, to be counted.

    Raises:
        UserError: transformers cannot build a causal model from it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"{type(config).__name__}: cannot be counted: {first_line(error)}") from None


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, in order."""
    return [m for m in model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]


def norms_beside(model: PreTrainedModel) -> list[nn.Module]:
    """The norms with weights that are in no decoder layer."""
    inside = {m for layer in decoder_layers(model) for m in layer.modules()}
    beside = [m for m in model.base_model.modules() if m not in inside]
    return [m for m in beside if any(p.dim() == 1 for p in m.parameters(recurse=False))]


def kinds_of(model: PreTrainedModel) -> list[int]:
    """Of each decoder layer, of which kind it is, counted from 0 in the order of their first layers.

    Layers of a kind differ in their weights alone.

    Raises:
        UserError: there are too many.
    """
    text, layers = model.config.get_text_config(), decoder_layers(model)
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    by_number = bool(getattr(text, "scale_attn_by_inverse_layer_idx", False))
    described = [(types[i], i if by_number else None, _settings(layer)) for i, layer in enumerate(layers)]
    known = list(dict.fromkeys(described))
    if len(known) > KINDS:
        raise UserError(f"{type(model).__name__}: its layers are of {len(known)} kinds: cannot be streamed")
    return [known.index(one) for one in described]


def _settings(layer: nn.Module) -> str:
    """All that makes one layer compute other than another with the same weights."""
    out = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in _NUMBERS}
        values = {k: v for k, v in plain.items() if isinstance(v, (str, int, float, bool, tuple, list, type(None)))}
        made = {k: b for k, b in module._buffers.items() if k in module._non_persistent_buffers_set and b is not None}
        kept = {k: _bits(b) for k, b in made.items()}
        out.append((name, type(module).__name__, sorted(values.items()), kept))
    return repr(out)


def _bits(tensor: Tensor) -> int | None:
    """A hash of what it holds; None on the meta device."""
    return None if tensor.is_meta else hash(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True, slots=True)
class LayerRange:
    """What of a model's weights is held: the decoder layers from `first` to before `last`, of `layers` in all, and
    all that lies beside the layers; but the input embedding only `with_embedding`, and the head only `with_head`."""

    first: int
    last: int
    layers: int
    with_embedding: bool = True
    with_head: bool = True

    def absent(self, model: PreTrainedModel) -> set[int]:
        """The `id`s of the parameters and buffers of a model that are not held."""
        layers = decoder_layers(model)
        if len(layers) != self.layers:
            raise ValueError(f"{self.layers} layers of a model of {len(layers)}")
        gone = layers[: self.first] + layers[self.last :]
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not self.with_embedding:
            gone.append(embedding)
        if not self.with_head and head is not None:
            gone.append(head)
        inside = {module for one in gone for module in one.modules()}
        kept = {id(t) for m in model.modules() if m not in inside for t in own_tensors(m)}
        return {id(t) for m in inside for t in own_tensors(m)} - kept


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module that are in none of its modules."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
