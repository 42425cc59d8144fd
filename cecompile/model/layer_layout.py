"""Where the tensors of a decoder layer lie in one run of bytes, the same for all layers of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cecompile.errors import UserError
from cecompile.model.structure import decoder_layers

PLACES = 2  # for layers on the device: one computes while the next is read
ALIGNED = 256  # bytes; where each tensor of a layer begins


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a layer lie in one run of bytes.

    Attributes:
        shapes: by their names in the layer; `dtype` is that of all.
        starts: their first bytes.
        size: of all, in bytes.
    """

    dtype: torch.dtype
    shapes: Mapping[str, torch.Size]
    starts: Mapping[str, int]
    size: int

    @classmethod
    def of(cls, layer: nn.Module) -> "Layout":
        """For the parameters and persistent buffers of a layer, all of one dtype."""
        held = layer.state_dict()
        starts, size = {}, 0
        for name, tensor in held.items():
            starts[name] = size
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return cls(next(iter(held.values())).dtype, {n: t.shape for n, t in held.items()}, starts, size)

    def views(self, content: Tensor) -> dict[str, Tensor]:
        """`content`, (size,) uint8, as the layer's tensors by name."""
        out = {}
        for name, shape in self.shapes.items():
            at = self.starts[name]
            out[name] = content[at : at + shape.numel() * self.dtype.itemsize].view(self.dtype).view(shape)
        return out


def layer_layout(model: Any) -> Layout:
    """The layout that all decoder layers of a model have; of one on the meta device too.

    Raises:
        UserError: they differ, or share tensors.
    """
    layers = decoder_layers(model)
    layout = Layout.of(layers[0])
    if any(Layout.of(layer) != layout for layer in layers):
        raise UserError(f"{type(model).__name__}: its layers hold different tensors: cannot be streamed")
    held = [id(t) for layer in layers for t in layer.state_dict(keep_vars=True).values()]
    if len(set(held)) < len(held):
        raise UserError(f"{type(model).__name__}: its layers share tensors: cannot be streamed")
    return layout
