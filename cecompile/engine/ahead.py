"""What the compiler works out once a process before it looks anything up, done while weights are read.

Inductor's cache keys hold hashes over all sources of torch and Triton, and on a CPU it builds and loads a small program
for each instruction set it might use. Reading weights leaves a core free for that.
"""

import contextlib
import functools
import threading
from collections.abc import Callable

from torch._inductor import codecache, cpu_vec_isa


@functools.cache
def begin(device: str) -> threading.Thread:
    """Starts on it, once a process; whoever compiles joins the thread first.

    Args:
        device: "cpu" or "cuda".
    """
    if device == "cpu":
        _import_what_builds()
    thread = threading.Thread(target=_work_out, args=(device,), name="compiler", daemon=True)
    thread.start()
    return thread


def _import_what_builds() -> None:
    """Here, as two threads that import at once may each see half of a module."""
    import torch._inductor.cpp_builder
    import torch.utils.cpp_extension  # noqa: F401


def _work_out(device: str) -> None:
    steps: list[Callable[[], object]] = [codecache.torch_key, codecache.CacheBase.get_system]
    if device == "cpu":
        steps.append(cpu_vec_isa.pick_vec_isa)
    for step in steps:  # they keep their results; a failure is met again, and told, where the result is needed
        with contextlib.suppress(Exception):
            step()
