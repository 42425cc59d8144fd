"""CUDA graphs: a pass recorded once and replayed as a whole."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def settle(forward: Callable[[], None]) -> None:
    """Runs `forward`, so that it is compiled and all libraries are set up."""
    stream = _beside(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)


def capture(forward: Callable[[], None], pool: Any, settled: bool = False) -> torch.cuda.CUDAGraph:
    """Captures `forward` in a graph, once it is settled. Meanwhile no other thread may use the device.

    Args:
        forward: works on static buffers only.
        pool: handle of the memory pool that graphs which never run at the same time share.
        settled: it is.
    """
    if not settled:
        settle(forward)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        forward()
    return graph


@functools.cache
def _beside(device: int) -> torch.cuda.Stream:
    """A stream to settle on, always the same: cuBLAS keeps a workspace of 32 MiB and more for each that it has seen."""
    return torch.cuda.Stream(device)
