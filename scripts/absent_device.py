"""A CUDA device that is not there: enough of one that Inductor writes kernels for it and Triton compiles them.

Tensors on it are fake, so they need no memory, and nothing can run. This works with a CPU build of torch too, as long
as Triton and a C++ compiler are installed.
"""

import contextlib
import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx
import torch._inductor.config
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

# No cache, or there would be nothing to see; no launcher that keeps nothing of what Triton made.
_OPTIONS: dict[str, Any] = {"compile_threads": 1, "force_disable_caches": True}
for _name in ("use_static_triton_launcher", "use_static_cuda_launcher"):  # what torch calls it now, and called it
    if hasattr(torch._inductor.config, _name):
        _OPTIONS[_name] = False


@dataclass(frozen=True, slots=True)
class Properties:
    """A device as torch describes it; what Inductor asks for, and no more."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int  # bytes
    shared_memory_per_multiprocessor: int  # bytes
    regs_per_multiprocessor: int
    max_threads_per_multi_processor: int
    L2_cache_size: int  # bytes
    is_integrated: bool
    max_threads_per_block: int = 1024
    warp_size: int = 32


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled kernel: its name, the configuration it was compiled with, and what Triton made of it."""

    name: str
    config: Any  # triton.Config
    compiled: Any  # triton.compiler.CompiledKernel


@contextlib.contextmanager
def absent_device(properties: Properties, version: str, found: Callable[[Kernel], None]) -> Iterator[torch.device]:
    """While this lasts, `cuda:0` is such a device, and tensors made are fake.

    What `torch.compile` compiles is compiled as for the real device, up to the machine code, in every configuration
    that would be tried, and `found` is called with each; then it runs uncompiled, on fake tensors, which gives shapes
    only. `version` is CUDA's, as in `torch.version.cuda`; taken where torch is a CPU build.
    """
    _install_guard()
    with contextlib.ExitStack() as stack:
        for patch in _patches(properties, version, found):
            stack.enter_context(patch)
        active = triton.runtime.driver
        before = getattr(active, "_active", None)
        target = GPUTarget("cuda", properties.major * 10 + properties.minor, properties.warp_size)
        active.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
        stack.callback(setattr, active, "_active", before)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield torch.device("cuda", 0)


class _OnCPU(TorchDispatchMode):
    """Makes real tensors on the CPU that were asked for on another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{k: torch.device("cpu") if k == "device" else v for k, v in (kwargs or {}).items()})


def _install_guard() -> None:
    """Gives torch a guard for CUDA devices that does nothing: a CPU build has none, a CUDA build's asks a driver."""
    source = """
        #include <c10/core/impl/DeviceGuardImplInterface.h>
        static const c10::impl::DeviceGuardImplRegistrar registrar(
            c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
    """
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", f"-I{root / 'include'}"]
        command += [f"-L{root / 'lib'}", "-lc10", "-o", str(library)]
        subprocess.run(command, input=source, text=True, check=True)
        ctypes.CDLL(str(library))


def _patches(properties: Properties, version: str, found: Callable[[Kernel], None]) -> Iterator[Any]:
    def giving(value: Any) -> Callable[..., Any]:  # one function each: Dynamo tells them apart by identity
        return lambda *_, **__: value

    device = {
        "is_available": True, "is_initialized": True, "_lazy_init": None, "device_count": 1, "current_device": 0,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor), "get_device_name": properties.name,
        "get_rng_state": torch.empty(0, dtype=torch.uint8), "set_rng_state": None, "synchronize": None,
        "current_stream": None, "is_current_stream_capturing": False,
    }  # fmt: skip
    interface = {
        "device_count": 1, "current_device": 0, "exchange_device": 0, "maybe_exchange_device": 0, "set_device": None,
        "get_raw_stream": 0, "get_device_properties": properties,
    }  # fmt: skip
    for name, value in device.items():
        yield mock.patch.object(torch.cuda, name, giving(value))
    for name, value in interface.items():
        yield mock.patch.object(CudaInterface, name, staticmethod(giving(value)))
    for name in ("current_device", "get_device_properties"):
        yield mock.patch.object(CudaInterface.Worker, name, staticmethod(giving(interface[name])))
    yield mock.patch.object(torch._C, "_cuda_getCurrentRawStream", giving(0), create=True)
    yield mock.patch.object(triton_helpers, "set_driver_to_gpu", giving(None))  # kernels ask for it as they are loaded
    yield mock.patch.object(torch.version, "cuda", torch.version.cuda or version)
    yield mock.patch.object(FakeTensorMode, "avoid_device_init", True)
    yield mock.patch.object(fake_tensor, "init_gpu_context", giving(None))
    yield torch._inductor.config.patch(_OPTIONS)
    fold = UniformValueConstantFolder.run  # computes with tensors of one element, real ones

    def fold_on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _OnCPU():
            return fold(self, *args, **kwargs)

    yield mock.patch.object(UniformValueConstantFolder, "run", fold_on_cpu)
    yield mock.patch.object(AsyncCompile, "triton", lambda _, *args, **__: _compile_kernel(found, *args))
    compile_fx = torch._inductor.compile_fx.compile_fx

    def compile_only(graph: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        compile_fx(graph, inputs, *args, **kwargs)
        return graph.forward

    yield mock.patch.object(torch._inductor.compile_fx, "compile_fx", compile_only)


def _compile_kernel(found: Callable[[Kernel], None], name: str, source: str, *_: Any) -> Any:
    """Compiles a kernel in all configurations that Inductor would try. What is returned can be run: it does nothing."""
    kernel = getattr(PyCodeCache.load(source), name)
    kernel.precompile(warm_cache_only=True)
    for result in kernel.compile_results:
        found(Kernel(name, result.config, result.kernel))
    return SimpleNamespace(run=lambda *_, **__: None)
