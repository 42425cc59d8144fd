"""Set-up that a process needs once before compiling or running, done while weights are read.

Inductor hashes all sources of torch and Triton for its cache keys, and on a CPU builds and loads a small program per
instruction set. On CUDA cuBLAS is set up. Dynamo, from Python 3.11 on, reads the whole source of each traced file, to
name the function of a line.
"""

import contextlib
import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from cecompile import device as device_memory

WORKERS = "TORCHINDUCTOR_COMPILE_THREADS"  # torch's own variable: processes that compile
# the longest of the files that Dynamo traces for decoder layers
TRACED = ("transformers.modeling_utils", "transformers.activations", "torch.nn.attention.flex_attention")


@functools.cache
def begin(device: torch.device) -> threading.Thread:
    """Starts the set-up for `device` in a thread; join the thread before compiling.

    Where the GPU's memory is the host's, this process alone compiles: on one H200 idle workers took 0.6 GB.
    """
    # Not in the thread: of two threads that import at once, each may see half of a module.
    with contextlib.suppress(ImportError):
        importlib.import_module("torch._inductor.compile_fx")
    if device_memory.is_integrated(device) and WORKERS not in os.environ:
        torch._inductor.config.compile_threads = 1
    if device.type == "cpu":
        with contextlib.suppress(ImportError):
            from cecompile.engine.inductor_cpu import quote_paths

            quote_paths()
            importlib.import_module("torch.utils.cpp_extension")
    thread = threading.Thread(target=_do, args=(device,), name="ahead", daemon=True)
    thread.start()
    return thread


def _do(device: torch.device) -> None:
    def inductor(name: str) -> Any:
        return importlib.import_module(f"torch._inductor.{name}")

    steps: list[Callable[[], object]] = [
        lambda: inductor("codecache").torch_key(),
        lambda: inductor("codecache").CacheBase.get_system(),
        lambda: inductor("cpu_vec_isa").pick_vec_isa() if device.type == "cpu" else _set_up_cublas(device),
        _read_sources,
    ]
    # All steps keep their results. A failure recurs, and is reported, where the result is needed; a name that torch
    # lacks costs the head start only.
    for step in steps:
        with contextlib.suppress(Exception):
            step()


def _read_sources() -> None:
    from torch._dynamo import funcname_cache

    for name in TRACED:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            funcname_cache.get_funcname(file, 1)


def _set_up_cublas(device: torch.device) -> None:
    some = torch.ones(8, 8, device=device, dtype=torch.bfloat16)  # as models are: each dtype loads kernels of its own
    torch.mm(some, some)
