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

import torch
from torch._inductor import codecache, cpu_vec_isa

# the longest that decoder layers are traced through
TRACED = ("transformers.modeling_utils", "transformers.activations", "torch.nn.attention.flex_attention")


@functools.cache
def begin(device: torch.device) -> threading.Thread:
    """Starts on it, for this device; whoever compiles joins the thread first."""
    if device.type == "cpu":  # here: two threads that import at once may each see half of a module
        for name in ("torch._inductor.cpp_builder", "torch.utils.cpp_extension"):
            importlib.import_module(name)
        from cecompile.engine.cpp_paths import quote_paths

        quote_paths()
    thread = threading.Thread(target=_do, args=(device,), name="ahead", daemon=True)
    thread.start()
    return thread


def _do(device: torch.device) -> None:
    steps: list[Callable[[], object]] = [codecache.torch_key, codecache.CacheBase.get_system]
    steps.append(cpu_vec_isa.pick_vec_isa if device.type == "cpu" else lambda: _set_up_cublas(device))
    steps.append(_read_sources)
    for step in steps:  # they keep their results; a failure is met again, and told, where the result is needed
        with contextlib.suppress(Exception):
            step()


def _read_sources() -> None:
    from torch._dynamo import funcname_cache  # torch's own business: where there is none, nothing is lost

    for name in TRACED:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            funcname_cache.get_funcname(file, 1)


def _set_up_cublas(device: torch.device) -> None:
    some = torch.ones(8, 8, device=device)
    torch.mm(some, some)
