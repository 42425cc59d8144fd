"""Architectures that trees compute exactly, as far as a model shows without weights, and how each gets its mask."""

import functools
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from cecompile.errors import UserError
from cecompile.model.structure import decoder_layers

# Models with attention code of their own that add a given mask to their scores and use given position ids.
BY_MASK = ("codegen", "falcon", "gptj", "xglm")
ALIBI = ("bloom", "mpt")
LAYERS = {"full_attention", "sliding_attention"}


def refusal(model: PreTrainedModel) -> str | None:
    """The reason why a model cannot be computed as trees, or None. Needs no weights; the probe checks the rest."""
    text = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return "it keeps a state from token to token"
    if getattr(text, "alibi", False) or text.model_type in ALIBI:
        return "distances between positions are in its attention (ALiBi)"
    if rope_type(text) == "dynamic":
        return "its rotary embedding depends on the longest sequence of a batch"
    kinds = set(getattr(text, "layer_types", None) or ()) - LAYERS
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if not decoder_layers(model):
        return f"transformers {transformers.__version__} makes its decoder layers of a class unknown here"
    if not hasattr(nn.Module, "_compiled_call_impl"):
        return f"torch {torch.__version__} keeps a module's compiled code in a place unknown here"
    if not takes_ours(model) and text.model_type not in BY_MASK:
        return "its attention cannot be replaced"
    return None


def takes_ours(model: PreTrainedModel) -> bool:
    """Whether a model asks `transformers` for its attention function by name; other models are given a mask."""
    kind: Any = type(model)
    return _asks_by_name(kind)


@functools.cache
def _asks_by_name(kind: Any) -> bool:
    asks = getattr(kind, "_can_set_attn_implementation", None)  # reads the class's source file
    if asks is None:
        unknown = f"transformers {transformers.__version__} does not say which models' attention can be replaced"
        raise UserError(f"{unknown}; --engine reference runs without")
    return bool(asks())


def rope_type(config: Any) -> str | None:
    """The kind of scaling of a configuration's rotary embedding."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope.get("rope_type", rope.get("type"))


def boundary_of(config: Any) -> int | None:
    """The longest input in tokens for longrope's short frequencies; None for a model with one set of frequencies."""
    text = config.get_text_config()
    if rope_type(text) != "longrope":
        return None
    name = "original_max_position_embeddings"
    found = (getattr(text, "rope_parameters", None) or {}).get(name) or getattr(text, name, None)
    return None if found is None else int(found)
