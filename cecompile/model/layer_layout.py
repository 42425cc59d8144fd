"""The layout of a decoder layer's tensors in one run of bytes, the same for all layers of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cecompile.errors import UserError
from cecompile.model.structure import decoder_layers

PLACES = 2  # for layers on the device: one layer computes while the next is read
ALIGNED = 256  # bytes; each tensor of a layer begins at a multiple


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of a layer's tensors, all of one dtype, in one run of bytes."""

    dtype: torch.dtype
    shapes: Mapping[str, torch.Size]  # by the tensor's name in the layer
    starts: Mapping[str, int]  # each tensor's first byte, by name
    size: int  # bytes of all tensors, with the gaps between them

    @classmethod
    def of(cls, layer: nn.Module) -> "Layout":
        """The layout of a layer's parameters and persistent buffers, all of one dtype."""
        held = layer.state_dict()
        starts, size = {}, 0
        for name, tensor in held.items():
            starts[name] = size
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return cls(next(iter(held.values())).dtype, {n: t.shape for n, t in held.items()}, starts, size)

    def views(self, content: Tensor) -> dict[str, Tensor]:
        """The layer's tensors by name, as views of `content`, (size,) uint8."""
        return {
            name: content[at : at + shape.numel() * self.dtype.itemsize].view(self.dtype).view(shape)
            for (name, shape), at in zip(self.shapes.items(), self.starts.values(), strict=True)
        }


def layer_layout(model: Any) -> Layout:
    """The layout of every decoder layer of a model, which may be on the meta device.

    Raises UserError: the layers have different layouts, or share tensors.
    """
    layers = decoder_layers(model)
    layout = Layout.of(layers[0])
    if any(Layout.of(layer) != layout for layer in layers):
        raise UserError(f"{type(model).__name__}: its layers hold different tensors: cannot be streamed")
    held = [id(t) for layer in layers for t in layer.state_dict(keep_vars=True).values()]
    if len(set(held)) < len(held):
        raise UserError(f"{type(model).__name__}: its layers share tensors: cannot be streamed")
    return layout
