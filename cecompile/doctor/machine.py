"""This machine: devices, host, versions, and the tools that compiling needs.

The paths of a Jetson, and the facts on its memory, are from NVIDIA's Jetson Linux documentation.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from cecompile.compile_cache.store import CompileCache, default_directory
from cecompile.errors import UserError
from cecompile.procfs import cpu_model, read_meminfo, read_text

PACKAGES = ("cecompile", "torch", "transformers", "triton", "safetensors", "tokenizers", "numpy")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CXX", "HF_HOME", "HF_HUB_OFFLINE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH",
)  # fmt: skip
DRIVER_NODES = ("dev/nvidiactl", "dev/nvgpu/igpu0", "dev/nvhost-gpu")  # the last two on a Jetson
GPU_CLOCKS = ("17000000.gpu", "17000000.ga10b")  # the Orin's GPU under /sys/class/devfreq, by Jetson Linux version
PATIENCE = 10.0  # seconds for a tool to answer


@dataclass(frozen=True, slots=True)
class Device:
    """A CUDA device. An `integrated` one shares the host's memory. `free_bytes` are those left to a new allocation."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    integrated: bool
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Host:
    """CPU and memory. `available_bytes` counts the page cache that can be reclaimed."""

    cpu: str
    cpus: int
    torch_threads: int
    total_bytes: int
    available_bytes: int
    swap_bytes: int


@dataclass(frozen=True, slots=True)
class Clock:
    """The GPU's clock in Hz, and the governor's name. An unreadable value is None."""

    current: int | None
    lowest: int | None
    highest: int | None
    governor: str | None

    @property
    def pinned(self) -> bool:
        """Whether the clock stays at its highest, as `jetson_clocks` sets it."""
        return self.governor == "performance" or (self.lowest is not None and self.lowest == self.highest)


@dataclass(frozen=True, slots=True)
class Jetson:
    """Facts that only a Jetson has; `temperatures` are in degrees Celsius by thermal zone.

    `power_mode` is None where nvpmodel is missing or silent, as in containers.
    """

    release: str | None
    power_mode: str | None
    gpu_clock: Clock | None
    temperatures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that compiling needs: paths with versions, None for a missing tool.

    Attributes:
        cxx_wanted: the C++ compiler's name: $CXX, else g++. Torch looks for no other.
        cxx: the compiler of the name `cxx_wanted`.
        clang: clang++, which serves if CXX names clang++.
        python_header: Python.h, which compiled kernels include.
        ptxas: the assembler that Triton needs.
        ptxas_by: the source of `ptxas`: "TRITON_PTXAS_PATH", "triton" (bundled with Triton), or "toolkit" (CUDA's in
            /usr/local/cuda, where Triton does not look).
    """

    cxx_wanted: str
    cxx: str | None
    clang: str | None
    python_header: str | None
    ptxas: str | None
    ptxas_by: str | None


@dataclass(frozen=True, slots=True)
class Cache:
    """The compile cache's directory: entries, their bytes, why the directory is refused, and faults of entries."""

    directory: str
    entries: int
    bytes: int
    refused: str | None
    damaged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """All that `judge` looks at.

    Attributes:
        versions: of packages and of Python; None for a package that is not installed.
        torch_cuda: the CUDA version that torch was built with; None for a CPU build.
        torch_architectures: the architectures that torch has kernels for, such as "sm_80" and "compute_90".
        cuda_driver: the sign of NVIDIA's driver, see `find_driver`.
        environment: the VARIABLES that are set.
    """

    devices: tuple[Device, ...]
    host: Host
    jetson: Jetson | None
    versions: dict[str, str | None]
    torch_cuda: str | None
    torch_architectures: tuple[str, ...]
    cuda_driver: str | None
    tools: Tools
    cache: Cache
    environment: dict[str, str]


def gather(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Facts:
    """Reads the facts. A fact that cannot be read is missing; no error is raised for it.

    Args:
        root: the directory that has /proc, /sys, /etc and /usr.
        environment: variables; tools are looked for in its PATH.
    """
    memory = read_meminfo(root)
    return Facts(
        devices=read_devices(memory),
        host=_host(root, memory),
        jetson=read_jetson(root, environment.get("PATH", "")),
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        torch_cuda=torch.version.cuda,
        torch_architectures=tuple(torch.cuda.get_arch_list()),
        cuda_driver=find_driver(root),
        tools=find_tools(root, environment),
        cache=read_cache(default_directory()),
        environment={name: environment[name] for name in VARIABLES if name in environment},
    )


def read_cache(directory: Path) -> Cache:
    """The state of the compile cache. A missing directory is not made."""
    try:
        entries = CompileCache(directory).entries() if directory.exists() else []
    except UserError as error:
        return Cache(str(directory), 0, 0, str(error), ())
    damaged = tuple(entry.problem for entry in entries if entry.problem)
    return Cache(str(directory), len(entries), sum(entry.size for entry in entries), None, damaged)


def read_jetson(root: Path, search_path: str) -> Jetson | None:
    """The facts that only a Jetson has; None on any other machine."""
    release = read_text(root / "etc/nv_tegra_release")
    gpu = next((d for name in GPU_CLOCKS if (d := root / "sys/class/devfreq" / name).is_dir()), None)
    if release is None and gpu is None:
        return None
    first = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", release or "")
    clock = None
    if gpu is not None:
        current, lowest, highest = (_number(gpu / f"{name}_freq") for name in ("cur", "min", "max"))
        clock = Clock(current, lowest, highest, read_text(gpu / "governor"))
    answer = _run(shutil.which("nvpmodel", path=search_path), "-q")
    mode = re.search(r"^NV Power Mode: (.+)$", answer or "", re.MULTILINE)
    zones = {zone: _number(zone / "temp") for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))}
    return Jetson(
        release=f"R{first[1]}.{first[2]}" if first else release and release.splitlines()[0],
        power_mode=mode[1].strip() if mode else None,
        gpu_clock=clock,
        temperatures={read_text(z / "type") or z.name: at / 1000 for z, at in zones.items() if at is not None},
    )


def find_driver(root: Path) -> str | None:
    """The sign of NVIDIA's kernel driver, its version or a device node; None without a driver."""
    version = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", read_text(root / "proc/driver/nvidia/version") or "")
    if version:
        return version[1]
    return next((f"/{node}" for node in DRIVER_NODES if (root / node).exists()), None)


def find_tools(root: Path, environment: Mapping[str, str]) -> Tools:
    """Compiler, header and assembler, where torch and Triton look for them."""
    search_path, wanted = environment.get("PATH", ""), environment.get("CXX", "g++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    given, triton = environment.get("TRITON_PTXAS_PATH"), util.find_spec("triton")
    bundled = (triton and triton.submodule_search_locations) or ()
    candidates = [("TRITON_PTXAS_PATH", Path(given))] if given else []
    candidates += [("triton", Path(directory) / "backends/nvidia/bin/ptxas") for directory in bundled]
    candidates.append(("toolkit", root / "usr/local/cuda/bin/ptxas"))
    ptxas_by, ptxas = next(((by, str(path)) for by, path in candidates if path.is_file()), (None, None))
    return Tools(
        cxx_wanted=wanted,
        cxx=_with_version(shutil.which(wanted, path=search_path)),
        clang=_with_version(shutil.which("clang++", path=search_path)),
        python_header=str(header) if header.is_file() else None,
        ptxas=_with_version(ptxas),
        ptxas_by=ptxas_by,
    )


def read_devices(memory: Mapping[str, int]) -> tuple[Device, ...]:
    """The CUDA devices; `memory` has the sizes of /proc/meminfo in bytes."""
    devices = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of faults that are findings
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            integrated = bool(getattr(properties, "is_integrated", False))
            try:
                free, total = torch.cuda.mem_get_info(index)
            except RuntimeError:  # a device that is full, or has a build of torch that does not suit it
                free, total = 0, properties.total_memory
            if integrated:  # the driver then counts page cache as used
                free = min(total, memory.get("MemAvailable", free))
            name, capability = properties.name, (properties.major, properties.minor)
            devices.append(Device(name, capability, properties.multi_processor_count, integrated, total, free))
    return tuple(devices)


def _host(root: Path, memory: Mapping[str, int]) -> Host:
    board = (read_text(root / "proc/device-tree/model") or "").strip("\0")
    affinity = getattr(os, "sched_getaffinity", None)
    return Host(
        cpu=cpu_model(root) or board or platform.machine(),
        cpus=len(affinity(0)) if affinity else os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        total_bytes=memory.get("MemTotal", 0),
        available_bytes=memory.get("MemAvailable", 0),
        swap_bytes=memory.get("SwapTotal", 0),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # some containers' Triton goes by another name
        return "unknown version" if util.find_spec(package) else None


def _with_version(tool: str | None) -> str | None:
    """The tool's path and version, as `--version` prints the version; None if the tool is missing or does not run."""
    answer = _run(tool, "--version")
    if answer is None:
        return None
    number = re.search(r"\d+\.\d+(\.\d+)?", answer)
    return f"{tool} {number[0]}" if number else tool


def _run(tool: str | None, argument: str) -> str | None:
    """The output of a tool; None if the tool is missing, fails or takes more than PATIENCE."""
    if not tool:
        return None
    try:
        done = subprocess.run([tool, argument], capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _number(path: Path) -> int | None:
    text = read_text(path) or ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None
