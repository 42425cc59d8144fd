"""CUDA graphs: a pass recorded once and replayed as a whole."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def settle(forward: Callable[[], None]) -> None:
    """Runs `forward` on a side stream, so that its code is compiled and all libraries are set up."""
    stream = _beside(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)


def capture(forward: Callable[[], None], pool: Any, settled: bool = False) -> torch.cuda.CUDAGraph:
    """Captures `forward`, which works on static buffers only, in a graph. Meanwhile no other thread may use the device.

    Graphs that never run at the same time share a memory `pool`. With `settled`, `settle` has run `forward` already.
    """
    if not settled:
        settle(forward)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        forward()
    return graph


@functools.cache
def _beside(device: int) -> torch.cuda.Stream:
    """One stream for all settling: cuBLAS keeps a workspace of 32 MiB and more for each stream in use."""
    return torch.cuda.Stream(device)
