"""What has to be done once a process before anything compiles or runs, done while weights are read.

Inductor's cache keys hold hashes over all sources of torch and Triton, and on a CPU it builds and loads a small program
for each instruction set it might use; on CUDA cuBLAS has to be set up. And Dynamo, from Python 3.11 on, reads the whole
source of whatever it traces to say which function a line is in. Reading weights leaves a core free for that.
"""

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

# the longest that decoder layers are traced through
TRACED = ("transformers.modeling_utils", "transformers.activations", "torch.nn.attention.flex_attention")


@functools.cache
def begin(device: torch.device) -> threading.Thread:
    """Starts on it, for this device; whoever compiles joins the thread first."""
    if device.type == "cpu":  # here: two threads that import at once may each see half of a module
        with contextlib.suppress(ImportError):
            for name in ("torch._inductor.cpp_builder", "torch.utils.cpp_extension"):
                importlib.import_module(name)
            from cecompile.engine.cpp_paths import quote_paths

            quote_paths()
    thread = threading.Thread(target=_do, args=(device,), name="ahead", daemon=True)
    thread.start()
    return thread


def _do(device: torch.device) -> None:
    steps: list[Callable[[], object]] = [
        lambda: _codecache().torch_key(),
        lambda: _codecache().CacheBase.get_system(),
        _pick_instructions if device.type == "cpu" else lambda: _set_up_cublas(device),
        _read_sources,
    ]
    # They keep their results. A failure is met again, and told, where the result is needed; a name that torch has no
    # more costs the head start.
    for step in steps:
        with contextlib.suppress(Exception):
            step()


def _codecache() -> Any:
    """Inductor's module of that name."""
    return importlib.import_module("torch._inductor.codecache")


def _pick_instructions() -> None:
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.pick_vec_isa()


def _read_sources() -> None:
    from torch._dynamo import funcname_cache

    for name in TRACED:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            funcname_cache.get_funcname(file, 1)


def _set_up_cublas(device: torch.device) -> None:
    some = torch.ones(8, 8, device=device)
    torch.mm(some, some)
