"""Digests of tensors, in chunks that several threads hash at once.

A tensor's digest is SHA-256 over the SHA-256 digests of its chunks. A chunk is CHUNK elements, so that the chunks of a
tensor before and after a conversion hold the same elements.
"""

import hashlib
from collections.abc import Iterable

import torch

CHUNK = 2**20  # elements


def chunk_bytes(dtype: torch.dtype) -> int:
    """The bytes of a chunk of a tensor."""
    return CHUNK * dtype.itemsize


def combined(digests: Iterable[bytes]) -> str:
    """A tensor's digest (hex) from its chunks' digests, in order. Without chunks, SHA-256 of no bytes."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def chunk_digests(content: torch.Tensor, dtype: torch.dtype) -> list[bytes]:
    """The digests of chunks in host memory. `content`, (bytes,) uint8, holds elements of `dtype`."""
    parts = content.split(chunk_bytes(dtype)) if len(content) else ()
    return [hashlib.sha256(part.numpy().data).digest() for part in parts]
