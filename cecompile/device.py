"""A device's memory: the free and used bytes, a limit, and the errors that mean that memory ran out."""

import ctypes
import gc
import re
import resource
import sys
from contextlib import suppress

import torch

from cecompile import procfs

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
OUT_OF_MEMORY = (  # in messages
    "out of memory", "NVML_SUCCESS == r INTERNAL ASSERT", "NvMap", "can't allocate memory", "CUDA_ERROR_OUT_OF",
)  # fmt: skip


def available(device: torch.device) -> int:
    """Bytes of the device's memory that this process may still take; on a CUDA device, what torch holds counts in.

    On the CPU and on an integrated GPU, these are the bytes of `procfs.memory_left`: `torch.cuda.mem_get_info` counts
    the page cache as used, though the system gives up the page cache when asked.
    """
    if device.type == "cpu":
        return procfs.memory_left()
    free = torch.cuda.mem_get_info(device)[0]  # creates the CUDA context, which takes memory
    return (procfs.memory_left() if is_integrated(device) else free) + torch.cuda.memory_reserved(device)


def give_back(device: torch.device) -> None:
    """Gives memory that nothing uses any more back to the system: garbage, torch's free blocks, malloc's free pages."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def is_the_hosts(device: torch.device) -> bool:
    """Whether a device's memory is the host's."""
    return device.type == "cpu" or is_integrated(device)


def used_already(device: torch.device) -> int:
    """Bytes that this process holds before loading a model: on the CPU the interpreter and its libraries."""
    return 0 if device.type == "cuda" else procfs.read_status().get("VmRSS", 0)


def peak(device: torch.device) -> int:
    """The most bytes in use at once: reserved by torch on a CUDA device, resident in the process on the CPU.

    VmHWM is preferred: getrusage may give the peak of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return procfs.read_status().get("VmHWM", most if sys.platform == "darwin" else most * 1024)


def parse_size(text: str) -> int:
    """Bytes from "30GB", "28GiB", "512M" or a number: at least 1, less than 2**63. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise ValueError(text)
    size = float(match[1]) * UNITS[match[2]]
    if not 1 <= size < 2**63:
        raise ValueError(text)
    return int(size)


def enforce(device: torch.device, limit: int) -> None:
    """Keeps torch's allocations on a CUDA device within `limit` bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out. On Jetson boards, often only the message shows this."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(form in str(error) for form in OUT_OF_MEMORY)


def is_integrated(device: torch.device) -> bool:
    """Whether a device is a GPU whose memory is the host's."""
    return device.type == "cuda" and getattr(torch.cuda.get_device_properties(device), "is_integrated", False)
