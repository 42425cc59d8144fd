"""A sample of a model: random weights, and only as many layers as show each kind of layer."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cecompile.model.structure import kinds_of, on_meta


def sample_model(config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Returns a model of this configuration with random weights and its first layers, up to the last new kind.

    Code that is compiled for the sample's layers is the code of all layers, because layers of a kind differ only in
    their weights.

    Raises:
        UserError: there is no such model, or its layers are of too many kinds.
    """
    kinds = kinds_of(on_meta(config))
    count = 1 + max(kinds.index(kind) for kind in set(kinds))
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == len(kinds):  # a setting for each layer
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(small, dtype=dtype)
    return model.eval().requires_grad_(False)
