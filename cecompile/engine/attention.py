"""Attention over token trees, as two attention implementations registered with `transformers`.

A stock model asks `transformers` by name for its mask and its attention function. The names registered here give masks
made from the running bucket's static buffers, and functions that take such masks. All else is the model's own code.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from cecompile.model.support import takes_ours
from cecompile.workload.plan import BLOCK
from cecompile.workload.stage import TILE

STRIPS = 4
NAMES = {"flex": "cecompile_tiles", "sdpa": "cecompile_dense"}  # "sdpa" in a name has its own rules in transformers
_before: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def install(model: PreTrainedModel, attention: str) -> None:
    """Makes `model` use our attention, "flex" or "sdpa".

    With "sdpa" a model that does not ask for its attention by name keeps its own.

    Raises:
        NotImplementedError: "flex", for a model that does not ask by name.
    """
    global _shared_memory
    if model.device.type == "cuda":
        _shared_memory = torch.cuda.get_device_properties(model.device).shared_memory_per_multiprocessor
    if takes_ours(model):
        _before[model] = attention_before(model)
        _use(model, NAMES[attention])
    elif attention == "flex":
        raise NotImplementedError(f"{type(model).__name__} has an attention of its own")


def take_back(model: PreTrainedModel) -> str:
    """Undoes `install`; returns the model's own implementation."""
    stock = attention_before(model)
    _use(model, stock)
    return stock


def attention_before(model: PreTrainedModel) -> str:
    """The model's own attention implementation: the present one, or the one before `install`."""
    now: str = model.config._attn_implementation
    return _before.get(model, now) if now in NAMES.values() else now


@contextmanager
def stock_attention(model: PreTrainedModel, stock: str) -> Iterator[None]:
    """Makes the model run uncompiled within this context, with its own attention implementation `stock`."""
    now = model.config._attn_implementation
    _use(model, stock)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _use(model, now)


def _use(model: PreTrainedModel, name: str) -> None:
    if model.config._attn_implementation != name:  # some models accept none
        model.set_attn_implementation(name)


class Masks:
    """A source of masks for models with our attention; in use while `active`."""

    def get(self, window: int | None, dtype: torch.dtype) -> Tensor | BlockMask:
        """The mask of layers that see `window` tokens back along their path, or with None the whole path."""
        raise NotImplementedError

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """The model's arguments beside its tokens: our mask, where the model does not ask for a mask by name."""
        return {} if takes_ours(model) else {"attention_mask": self.get(None, model.dtype)}

    @contextmanager
    def active(self) -> Iterator["Masks"]:
        """Makes models with our attention get their masks from this source, within this context."""
        global _active
        before, _active = _active, self
        try:
            yield self
        finally:
            _active = before


def reaching(window: int | None, slots: int) -> int | None:
    """`window`, or None where the window hides nothing: no two of `slots` tokens are as far apart as the window."""
    return None if window is None or slots <= window else window


def dense(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask for dense attention, (rows, 1, queries, keys): 0 where `visible` (without the 1), else -infinity."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[:, None]


class TreeMasks(Masks):
    """The attention masks of one bucket, read from its static buffers `part`, int32 on the device, by name.

    For the names see `workload.stage.fields`. Buffers with a tile index give block-sparse masks, for FlexAttention;
    others give dense masks, for scaled dot-product attention.
    """

    def __init__(self, part: Mapping[str, Tensor]) -> None:
        self._part = part
        self._blocks = "full_count" in part
        self._made: dict[tuple[int | None, torch.dtype], Tensor | BlockMask] = {}

    def get(self, window: int | None, dtype: torch.dtype) -> Tensor | BlockMask:
        """See `Masks`. Block-sparse masks are views of the buffers, made once; dense masks are made once per pass.

        Rows no longer than the window get the mask of the whole path, so that tiles without hidden pairs stay unmasked.
        """
        window = reaching(window, self._part["end"].shape[1])
        key = (window, dtype)
        if key not in self._made:
            self._made[key] = self._block_mask(window) if self._blocks else self._dense_mask(window, dtype)
        return self._made[key]

    @contextmanager
    def active(self) -> Iterator[Masks]:
        if not self._blocks:
            self._made.clear()
        with super().active():
            yield self

    def _dense_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        end, depth = self._part["end"], self._part["depth"]
        slot = torch.arange(end.shape[1], device=end.device, dtype=end.dtype)
        visible = (slot[None, None, :] <= slot[None, :, None]) & (slot[None, :, None] < end[:, None, :])
        if window is not None:
            visible &= depth[:, :, None] - depth[:, None, :] < window
        return dense(visible, dtype)

    def _block_mask(self, window: int | None) -> BlockMask:
        end, depth = self._part["end"], self._part["depth"]
        span = window or 0

        def path(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < end[b, k])

        def path_within_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < end[b, k]) & (depth[b, q] - depth[b, k] < span)

        # The kernel asks no mask function in full tiles. A window hides more, so no tile counts as full then.
        kinds = ("partial", "full") if window is None else ("any",)
        tiles: Any = [self._part[f"{kind}_{what}"][:, None] for kind in kinds for what in ("count", "index")]
        length = end.shape[1]
        # `BlockMask.from_kv_blocks` would also transpose the tiles, which only gradients need. On one H200 the kernels
        # for this took 0.1 GB of the device and 0.1 GB of the host.
        none: Any = [None] * (8 - len(tiles))
        mask = path if window is None else path_within_window
        return BlockMask((length, length), *tiles, *none, BLOCK_SIZE=(TILE, TILE), mask_mod=mask)  # type: ignore[misc]


_active: Masks | None = None


def _mask(*, dtype: torch.dtype, local_size: int | None = None, **_: Any) -> Tensor | BlockMask:
    if _active is None:
        raise RuntimeError("tree attention outside Masks.active()")
    return _active.get(local_size, dtype)


def _flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: BlockMask | Tensor,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of `query` (rows, heads, length, size) over `key` and `value` (rows, key-value heads, length, size).

    `s_aux` (heads,) is the logit of each head's sink: one more key, without a value.
    """
    if isinstance(attention_mask, Tensor):  # a step of decoding
        return _sdpa(module, query, key, value, attention_mask, scaling, softcap, s_aux, **kwargs)
    _refuse_unknown(module, kwargs)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    if query.device.type == "cpu":  # the CPU's kernel forgets a view's offset (torch 2.13)
        query, key, value = (t.clone(memory_format=torch.contiguous_format) for t in (query, key, value))
    out = attend(
        query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        score_mod=None if softcap is None else lambda score, b, h, q, k: softcap * torch.tanh(score / softcap),
        kernel_options=_kernel_options(query, value), return_lse=s_aux is not None,
    )  # fmt: skip
    if s_aux is not None:
        out, normaliser = out
        out = out * torch.sigmoid(normaliser - s_aux[None, :, None]).to(out.dtype)[..., None]
    return out.transpose(1, 2).contiguous(), None


_shared_memory = 0  # bytes per multiprocessor of the device; one block of threads may use all but 1 KiB


def _kernel_options(query: Tensor, value: Tensor) -> Any:
    """FlexAttention's tiles: the largest that fit into the device's shared memory, with the most stages that pay.

    Measured in passes of 7B and 1B models on an H100: 64 x 64 tiles with four warps and three stages took 0.71 and 0.75
    times as long as the default 128 x 128 tiles; eight warps took about twice as long as four; the third stage paid for
    heads of 128 but not of 64.
    """
    widths, size = (query.shape[-1], query.shape[-1] + value.shape[-1]), query.element_size()
    for queries, keys, stages in ((64, 64, 3), (64, 64, 2), (64, 32, 2), (32, 32, 1), (16, 16, 1)):
        if (size == 4 and keys == 64) or (stages == 3 and widths[0] < 128):
            continue  # float32 does without matrix units, and lacks registers
        if size * (queries * widths[0] + stages * keys * widths[1]) <= 0.9 * _shared_memory:
            return {"BLOCK_M": queries, "BLOCK_N": keys, "num_stages": stages, "num_warps": 4}
    return None


@functools.cache
def _compiled_flex() -> Any:
    """FlexAttention, compiled when first called. Uncompiled, the operator computes every score of the dense matrix."""
    return torch.compile(flex_attention, dynamic=False)  # imports Inductor, which dense attention does without


# All layers and buckets share a code object; each shape and mask adds a graph to the object.
for _name, _least in (("recompile_limit", 256), ("accumulated_recompile_limit", 4096)):
    if hasattr(torch._dynamo.config, _name):  # without the option, a run over the limit notes that it ran uncompiled
        setattr(torch._dynamo.config, _name, max(getattr(torch._dynamo.config, _name), _least))


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    _refuse_unknown(module, kwargs)
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    of_tree = query.shape[2] == key.shape[2]  # not a step of decoding, whose queries may be as many once grouped
    if groups > 1:  # torch's grouped attention is slow with a mask
        if of_tree:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        else:  # a few tokens of one row against a cache, which must not be copied
            query = query.reshape(1, key.shape[1], -1, query.shape[3])
            attention_mask = attention_mask.repeat(1, 1, groups, 1)
    if softcap is None and s_aux is None:
        attend = nn.functional.scaled_dot_product_attention
        strips = _strips(query, key, value, attention_mask) if of_tree else [(query, key, value, attention_mask)]
        parts = [attend(q, k, v, attn_mask=mask, scale=scaling) for q, k, v, mask in strips]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    else:
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + attention_mask
        if s_aux is not None:
            scores = torch.cat([scores, _sinks(s_aux, scores)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        out = weights[..., : key.shape[2]] @ value
    if out.shape[1] != heads:
        out = out.reshape(1, heads, -1, out.shape[3])
    return out.transpose(1, 2).contiguous(), None


def _strips(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The queries of a tree's rows in up to STRIPS strips, each with the keys, values and mask up to the strip's end.

    No token sees later tokens, yet a kernel with a mask computes all scores. On a CPU rows of 512 and 1,024 tokens took
    0.75 and 0.69 times as long in four strips as in one.
    """
    length = query.shape[2]
    if query.device.type != "cpu" or length <= BLOCK:
        return [(query, key, value, mask)]
    width = -(-length // STRIPS // BLOCK) * BLOCK
    parts = [(at, min(at + width, length)) for at in range(0, length, width)]
    # torch 2.8 does not trace a zip of unequal lengths
    return [(query[:, :, at:end], key[:, :, :end], value[:, :, :end], mask[:, :, at:end, :end]) for at, end in parts]


def _sinks(logits: Tensor, scores: Tensor) -> Tensor:
    """The sinks' logits (heads,) as one more key of scores (rows, heads or groups of heads, queries, keys)."""
    tokens = scores.shape[2] * scores.shape[1] // len(logits)
    each = logits.to(scores.dtype).view(scores.shape[1], -1, 1).expand(-1, -1, tokens)
    return each.reshape(1, scores.shape[1], scores.shape[2], 1).expand(len(scores), -1, -1, -1)


# Arguments that the mask covers, or that matter only in training or to other attention kernels.
_ANSWERED = {"dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position", "layer_idx"}


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    unknown = sorted(k for k, v in kwargs.items() if v is not None and v is not False and k not in _ANSWERED)
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} gives attention unknown arguments: {', '.join(unknown)}")


for _name, _attend in ((NAMES["flex"], _flex), (NAMES["sdpa"], _sdpa)):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, _mask)
