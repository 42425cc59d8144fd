"""Proof that the model that ran is the loaded model: its tensors are digested again on the device.

Loading digests the files' bytes. After the run, the bytes on the device are digested and compared name by name. Other
buffers are compared with their state right after loading. So rounding, pruning, an exchange or any other change to a
weight between the file and the last pass is found.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from cecompile.errors import CheckError
from cecompile.model.digest import chunk_bytes, chunk_digests, combined
from cecompile.model.load import Loaded
from cecompile.model.safetensors_reader import digest_of, host_buffers
from cecompile.model.support import rope_type

THREADS = min(8, os.cpu_count() or 1)  # nothing else runs meanwhile
BLOCK = 2**20  # bytes copied out at once, which divide a chunk; each thread has two such buffers
EQUAL = "equal to the checkpoint"
Together = Callable[[dict[Any, Any]], dict[Any, Any]]


@dataclass(frozen=True, slots=True)
class Content:
    """A tensor's dtype, shape, and digest (hex) of its elements, row-major; see `digest`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def made_buffers(model: PreTrainedModel) -> dict[str, Content]:
    """Contents of the buffers that the model's own code makes, by name."""
    stored = model.state_dict(keep_vars=True).keys()
    return contents({name: tensor for name, tensor in _named(model).items() if name not in stored})


class Proof:
    """A model's contents right after loading, before the model ran, to compare with its contents later.

    Args:
        loaded: the result of loading; None for a model that the caller loaded.
        made: the earlier `made_buffers`, where the model ran before its parameters were loaded.

    Attributes:
        verified: the fact that `check` establishes, in words: EQUAL, or less.
    """

    def __init__(
        self, model: PreTrainedModel, loaded: Loaded | None = None, made: Mapping[str, Content] = MappingProxyType({})
    ) -> None:
        self._config, self._loaded = _fixed(model.config), loaded
        stored, self.verified = _expected(loaded)
        named = _named(model)
        first = {id(tensor): name for name, tensor in reversed(named.items())}
        known = {name: stored[first[id(t)]] for name, t in named.items() if first[id(t)] in stored}
        known |= {name: content for name, content in made.items() if name in named}
        self._held = known | contents({name: t for name, t in named.items() if name not in known})

    def check(self, name: str, model: PreTrainedModel, together: Together = dict) -> str:
        """Digests the model on its device after the run, and compares.

        Args:
            name: the model's name, for messages.
            together: merges this part's entries with all other parts' entries, where the model is divided.

        Returns:
            SHA-256 (hex) of the device's tensors. Where `verified` is EQUAL, the checkpoint's fingerprint.

        Raises:
            CheckError: a tensor or a setting has changed; names the first change.
        """
        now = contents(self._as_long_as_before(model))
        for key in dict.fromkeys((*self._held, *now)):
            wrong = _difference(self._held.get(key), now.get(key))
            if wrong:
                raise CheckError(f"{name}: {key} {wrong}; nothing was written")
        config = _fixed(model.config)
        for key in dict.fromkeys((*self._config, *config)):
            if self._config.get(key) != config.get(key):
                raise CheckError(f"{name}: the configuration's {key} changed during the run; nothing was written")
        if self.verified != EQUAL or self._loaded is None:
            lines = sorted(f"{key} {one.dtype} {one.shape} {one.digest}" for key, one in together(now).items())
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()
        checkpoint, sources = self._loaded.checkpoint, self._loaded.sources
        held = together({i: now[key].digest for key, indices in sources.items() for i in indices})
        return digest_of(checkpoint.tensors, [held.get(i, digest) for i, digest in enumerate(checkpoint.digests)])

    def _as_long_as_before(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The model's tensors. A table that grew with the input (XGLM's positions) is cut to its earlier rows."""
        named, stored = _named(model), model.state_dict(keep_vars=True).keys()
        for name in named.keys() & self._held.keys() - stored:
            shape = self._held[name].shape
            if shape and named[name].shape[1:] == shape[1:]:
                named[name] = named[name][: shape[0]]
        return named


def contents(named: Mapping[str, Tensor]) -> dict[str, Content]:
    """The contents of tensors by name, in the given order. Several threads read; a tensor of two names is read once."""
    once = {id(tensor): tensor for tensor in named.values()}
    largest_first = sorted(once.values(), key=lambda tensor: -tensor.nbytes)
    device = next((t.device for t in largest_first if t.is_cuda), torch.device("cpu"))
    with host_buffers(2 * THREADS if device.type == "cuda" else 0, BLOCK, device) as buffers:
        free: SimpleQueue[list[Tensor]] = SimpleQueue()
        for i in range(0, len(buffers), 2):
            free.put(buffers[i : i + 2])
        with ThreadPoolExecutor(THREADS, "digest") as threads:
            digests = list(threads.map(lambda tensor: _digest(tensor, free), largest_first))
        free = SimpleQueue()  # no reference to the buffers may remain
    by_id = {id(tensor): digest for tensor, digest in zip(largest_first, digests, strict=True)}
    return {name: Content(t.dtype, tuple(t.shape), by_id[id(t)]) for name, t in named.items()}


def _digest(tensor: Tensor, free: "SimpleQueue[list[Tensor]]") -> str:
    """A tensor's digest (hex). A CUDA tensor is copied through two host buffers, taken from `free`."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if not content.is_cuda or len(content) == 0:
        return combined(chunk_digests(content.cpu(), tensor.dtype))
    hashes = [hashlib.sha256() for _ in range(0, len(content), chunk_bytes(tensor.dtype))]
    pair = free.get()
    try:
        copied: tuple[Any, Tensor, torch.cuda.Event] | None = None
        for number, part in enumerate(content.split(BLOCK)):
            buffer = pair[number % 2][: len(part)]
            buffer.copy_(part, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(content.device))
            _hash(copied)
            copied = hashes[number * BLOCK // chunk_bytes(tensor.dtype)], buffer, event
        _hash(copied)
    finally:
        free.put(pair)
    return combined(sha.digest() for sha in hashes)


def _hash(copied: tuple[Any, Tensor, torch.cuda.Event] | None) -> None:
    if copied is not None:
        sha, buffer, event = copied
        event.synchronize()
        sha.update(buffer.numpy().data)


def _named(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by all their names, without tensors that a run recomputes or that were not loaded."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    if rope_type(model.config.get_text_config()) in ("dynamic", "longrope"):  # chosen by the length of each input
        named = {n: t for n, t in named.items() if not n.endswith("inv_freq") or n.endswith("original_inv_freq")}
    return {name: tensor for name, tensor in named.items() if not tensor.is_meta}


def _expected(loaded: Loaded | None) -> tuple[dict[str, Content], str]:
    """The contents that the checkpoint gives the model, by first names, and the fact that equality establishes."""
    if loaded is None:
        return {}, "unchanged since adopted"
    if loaded.fallback is not None:
        return {}, "unchanged since loading"
    checkpoint, model = loaded.checkpoint, loaded.model.state_dict(keep_vars=True)
    out = {}
    for name, (index, *_) in loaded.sources.items():
        digest = checkpoint.converted.get(index, checkpoint.digests[index])
        out[name] = Content(model[name].dtype, checkpoint.tensors[index].shape, digest)
    to = f", converted to {str(loaded.model.dtype).removeprefix('torch.')}" if checkpoint.converted else ""
    return out, EQUAL + to


def _difference(before: Content | None, now: Content | None) -> str | None:
    if before is None:
        return "appeared during the run"
    if now is None:
        return "disappeared during the run"
    if (before.dtype, before.shape) != (now.dtype, now.shape):
        return f"is {now} after the run, it was loaded as {before}"
    return None if before.digest == now.digest else "has other values after the run than were loaded"


def _fixed(config: Any) -> dict[str, Any]:
    """A configuration without generation settings, which pipelines change."""
    generation = GenerationConfig().to_dict()
    return {key: value for key, value in config.to_dict().items() if key not in generation}
