"""The parts of a stock model: its decoder layers, its other norms, and the share that a process holds."""

import ast
import copy
import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cecompile.errors import UserError, first_line

KINDS = 4  # most kinds of layers that are compiled one by one
_NUMBERS = {"layer_idx", "layer_id", "layer_index"}  # differ between layers of one kind


def on_meta(config: Any) -> PreTrainedModel:
    """The causal model of a configuration, on the meta device. Raises UserError: there is no such model."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        fault = f"cannot be counted: {first_line(error)}"
        if sys.flags.optimize > 1:
            fault = "transformers needs Python's docstrings; leave out -OO and PYTHONOPTIMIZE=2, -O is possible"
        raise UserError(f"{type(config).__name__}: {fault}") from None


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, in order."""
    return [m for m in model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]


def returns_pair(layer: nn.Module) -> bool:
    """Whether a layer's code returns a pair: hidden states and attention weights."""
    code = ast.parse(textwrap.dedent(inspect.getsource(type(layer).forward)))
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(code))


def norms_beside(model: PreTrainedModel) -> list[nn.Module]:
    """The norms with weights outside of all decoder layers."""
    inside = {m for layer in decoder_layers(model) for m in layer.modules()}
    beside = [m for m in model.base_model.modules() if m not in inside]
    return [m for m in beside if any(p.dim() == 1 for p in m.parameters(recurse=False))]


def kinds_of(model: PreTrainedModel) -> list[int]:
    """The kind of each decoder layer, numbered from 0 by first appearance. Layers of a kind differ only in weights.

    Raises UserError: there are more than KINDS kinds.
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
    """All settings by which two layers with the same weights could compute different results."""
    out = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in _NUMBERS}
        values = {k: v for k, v in plain.items() if isinstance(v, (str, int, float, bool, tuple, list, type(None)))}
        made = {k: b for k, b in module._buffers.items() if k in module._non_persistent_buffers_set and b is not None}
        known = {k: b.cpu().contiguous() for k, b in made.items() if not b.is_meta}
        raw = {k: b.view(-1).view(torch.uint8).numpy().tobytes() for k, b in known.items()}
        out.append((name, type(module).__name__, sorted(values.items()), [(k, hash(raw.get(k))) for k in made]))
    return repr(out)


@dataclass(frozen=True, slots=True)
class LayerRange:
    """A process's share of a model: the decoder layers `first` to before `last`, of `layers`, and all other modules.

    The input embedding is included only `with_embedding`, and the head only `with_head`.
    """

    first: int
    last: int
    layers: int
    with_embedding: bool = True
    with_head: bool = True

    def absent(self, model: PreTrainedModel) -> set[int]:
        """The `id`s of a model's parameters and buffers that are not in the share."""
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
    """A module's parameters and buffers, without those of its submodules."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
