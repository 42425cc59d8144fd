"""What has to be done once a process before anything compiles or runs, done while weights are read.

Inductor's cache keys hold hashes over all sources of torch and Triton, and on a CPU it builds and loads a small program
for each instruction set it might use; on CUDA cuBLAS has to be set up. Reading weights leaves a core free for that.
"""

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable

import torch
from torch._inductor import codecache, cpu_vec_isa


@functools.cache
def begin(device: torch.device) -> threading.Thread:
    """Starts on it, for this device; whoever compiles joins the thread first."""
    if device.type == "cpu":  # here: two threads that import at once may each see half of a module
        for name in ("torch._inductor.cpp_builder", "torch.utils.cpp_extension"):
            importlib.import_module(name)
    thread = threading.Thread(target=_do, args=(device,), name="ahead", daemon=True)
    thread.start()
    return thread


def _do(device: torch.device) -> None:
    steps: list[Callable[[], object]] = [codecache.torch_key, codecache.CacheBase.get_system]
    steps.append(cpu_vec_isa.pick_vec_isa if device.type == "cpu" else lambda: _set_up_cublas(device))
    for step in steps:  # they keep their results; a failure is met again, and told, where the result is needed
        with contextlib.suppress(Exception):
            step()


def _set_up_cublas(device: torch.device) -> None:
    some = torch.ones(8, 8, device=device)
    torch.mm(some, some)
