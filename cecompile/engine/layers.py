"""The parts of a model that are compiled, and what may be done to what they are given."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cecompile.errors import UserError, first_line

Body = Callable[..., Tensor]  # token ids (rows, length) int64, and what else a decoder is called with: hidden states
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


def body_of(model: PreTrainedModel) -> Body:
    """The model's own decoder."""
    decoder = model.base_model

    def body(token_ids: Tensor, **arguments: Any) -> Tensor:
        hidden: Tensor = decoder(input_ids=token_ids, use_cache=False, **arguments).last_hidden_state
        return hidden

    return body


def compiled_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, and norms beside them but for those that are one operator of torch already."""
    return decoder_layers(model) + [m for m in norms_beside(model) if not type(m).__module__.startswith("torch.")]


def norms_beside(model: PreTrainedModel) -> list[nn.Module]:
    """The norms with weights that are in no decoder layer."""
    inside = {m for layer in decoder_layers(model) for m in layer.modules()}
    beside = [m for m in model.base_model.modules() if m not in inside]
    return [m for m in beside if any(p.dim() == 1 for p in m.parameters(recurse=False))]


@torch.inference_mode()
def inputs_are_free(model: PreTrainedModel, body: Body | None = None) -> bool:
    """Whether nobody reads the hidden states given to a decoder layer after it, so that it may overwrite them.

    Found out on a few tokens: each layer's input is filled with NaN once the layer is done, and the model's output
    stays finite all the same.

    Args:
        body: what runs the model's layers, where that is not its own decoder.
    """
    body = body or body_of(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    poisoned = 0

    def poison(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal poisoned
        hidden: Tensor = (*args, *kwargs.values())[0]  # by whatever name
        if hidden.untyped_storage().data_ptr() not in weights:
            hidden.fill_(torch.nan)
            poisoned += 1

    layers, attention = decoder_layers(model), model.config._attn_implementation
    hooks = [layer.register_forward_hook(poison, with_kwargs=True) for layer in layers]
    model.set_attn_implementation("eager")
    try:
        input_ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
        hidden = body(input_ids)
    finally:
        model.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()
    return poisoned == len(layers) and bool(hidden.isfinite().all())


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
