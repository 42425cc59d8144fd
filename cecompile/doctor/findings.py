"""Faults of this machine that will stop a run or slow it down, each with its mend."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cecompile.doctor.machine import Device, Facts
from cecompile.errors import printable

GIB = 2**30
LITTLE_MEMORY = 4 * GIB  # free memory below which models of a few billion parameters do not fit


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and its fix, a line each."""

    problem: str
    fix: str


def judge(facts: Facts) -> list[Finding]:
    """The findings, those that stop a run first."""
    return [finding for check in CHECKS for finding in check(facts)]


def _check_driver(facts: Facts) -> list[Finding]:
    if facts.devices or facts.cuda_driver is None:
        return []
    if facts.torch_cuda is None:
        return [
            Finding(
                f"the CUDA driver is there ({facts.cuda_driver}), but this torch is a CPU build",
                "install a CUDA build of torch (pytorch.org/get-started), on a Jetson the one of its container",
            )
        ]
    return [
        Finding(
            f"the CUDA driver is there ({facts.cuda_driver}), but torch sees no device",
            f"check CUDA_VISIBLE_DEVICES, that the driver is recent enough for CUDA {facts.torch_cuda}, and a "
            "container's --gpus all or --runtime nvidia",
        )
    ]


def _check_kernels(facts: Facts) -> list[Finding]:
    built = " ".join(facts.torch_architectures)
    jetson = "JetPack 6: use the container nvcr.io/nvidia/pytorch:25.06-py3-igpu; later ones may run it all the same"
    return [
        Finding(
            f'torch is built for {built}, not for {device.name} ({_capability(device)}): "no kernel image" may follow',
            jetson if device.integrated else "install a build of torch for it",
        )
        for device in facts.devices
        if facts.torch_architectures and not has_kernels(device, facts.torch_architectures)
    ]


def has_kernels(device: Device, architectures: tuple[str, ...]) -> bool:
    """Whether a build for these architectures runs on the device.

    Machine code (sm_) runs on its major version from its minor version up, but not across to an integrated GPU;
    what ends in "a" runs on exactly its version. Intermediate code (compute_) is compiled for any later version. See
    "Binary Compatibility" in the CUDA C++ Programming Guide.
    """
    return any(_runs_on(architecture, device) for architecture in architectures)


def _runs_on(architecture: str, device: Device) -> bool:
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if parts is None:
        return False
    kind, built, suffix = parts[1], (int(parts[2]), int(parts[3])), parts[4]
    if suffix == "a" or (kind == "sm" and device.integrated):
        return built == device.capability
    same_major = built[0] == device.capability[0]
    return built <= device.capability and (same_major or (kind == "compute" and not suffix))


def _check_compiler(facts: Facts) -> list[Finding]:
    tools = facts.tools
    if tools.cxx is None:
        clang = "set CXX=clang++, or " if tools.clang else ""
        problem = f"no C++ compiler ({tools.cxx_wanted or 'CXX is empty'}): models run uncompiled, and slower"
        return [Finding(problem, f"{clang}install g++: sudo apt-get install g++")]
    if tools.python_header is None:
        return [
            Finding(
                "Python.h is missing, which compiled kernels include: models run uncompiled, and slower",
                "install Python's headers: sudo apt-get install python3-dev",
            )
        ]
    return []


def _check_triton(facts: Facts) -> list[Finding]:
    if not facts.devices:
        return []
    if facts.versions["triton"] is None:
        return [
            Finding(
                "Triton is missing: nothing compiles for the GPU, models run uncompiled, and slower",
                "pip install triton, or use a container that has it",
            )
        ]
    tools, given = facts.tools, facts.environment.get("TRITON_PTXAS_PATH")
    if tools.ptxas is None:
        return [
            Finding(
                "ptxas is missing: Triton builds no kernels, models run uncompiled, and slower",
                "install the CUDA toolkit and set TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas",
            )
        ]
    path = tools.ptxas.split()[0]
    if given and tools.ptxas_by != "TRITON_PTXAS_PATH":
        return [Finding(f"TRITON_PTXAS_PATH={given}: there is no such file", f"export TRITON_PTXAS_PATH={path}")]
    if tools.ptxas_by == "toolkit":
        return [Finding("Triton comes without ptxas: it builds no kernels", f"export TRITON_PTXAS_PATH={path}")]
    return []


def _check_memory(facts: Facts) -> list[Finding]:
    close = "close other programs"
    out = []
    for device in facts.devices:
        if device.free_bytes < LITTLE_MEMORY:
            fix = f"{close}; without a desktop there is about 1.5 GB more" if device.integrated else f"{close} on it"
            out.append(Finding(f"{device.name}: {_gib(device.free_bytes)} free", fix))
    if not facts.devices and facts.host.available_bytes < LITTLE_MEMORY:
        out.append(Finding(f"{_gib(facts.host.available_bytes)} of memory available", close))
    if facts.host.swap_bytes and any(device.integrated for device in facts.devices):
        swap = f"the {_gib(facts.host.swap_bytes)} of swap cannot hold CUDA memory"
        out.append(Finding(swap, "count on free memory only: sudo systemctl isolate multi-user.target frees more"))
    return out


def _check_allocator(facts: Facts) -> list[Finding]:
    if not any(device.integrated for device in facts.devices):
        return []
    return [
        Finding(f"{name}={value}: fails on an integrated GPU", f"unset {name}; the native allocator works")
        for name, value in facts.environment.items()
        if name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        and re.search(r"expandable_segments:\s*true|cudaMallocAsync", value, re.IGNORECASE)
    ]


def _check_jetson(facts: Facts) -> list[Finding]:
    jetson = facts.jetson
    if jetson is None:
        return []
    out = []
    if jetson.power_mode is None:
        problem = "the power mode is not known (no nvpmodel): below MAXN, times are not comparable"
        out.append(Finding(problem, "on the Jetson itself, outside of a container: sudo nvpmodel -q"))
    elif not jetson.power_mode.upper().startswith("MAXN"):
        problem = f"power mode {jetson.power_mode}, below MAXN: slower, and times are not comparable"
        out.append(Finding(problem, "sudo nvpmodel -m 0"))
    if jetson.gpu_clock is None or not jetson.gpu_clock.pinned:
        out.append(Finding("clocks are not pinned: times vary", "sudo jetson_clocks"))
    return out


def _check_cache(facts: Facts) -> list[Finding]:
    cache = facts.cache
    if cache.refused:
        problem, _, fix = cache.refused.rpartition(": ")
        return [Finding(problem, fix)]
    return [Finding(f"compile cache: {problem}", "cecompile warm --prune") for problem in cache.damaged]


CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    _check_driver,
    _check_kernels,
    _check_compiler,
    _check_triton,
    _check_cache,
    _check_memory,
    _check_allocator,
    _check_jetson,
)


def as_json_object(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """The fields of `Facts`, and `findings`: a list of {problem, fix}. Memory in bytes, clocks in Hz."""
    return dataclasses.asdict(facts) | {"findings": [dataclasses.asdict(f) for f in findings]}


def print_doctor(console: Console, facts: Facts, findings: list[Finding]) -> None:
    """The facts as a table, a section each for device, host, Jetson, versions, tools and environment; then findings."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for section in SECTIONS:
        for name, value in section(facts):
            table.add_row(name, Text(printable(value)))
        table.add_section()
    console.print(table)
    if not findings:
        console.print("nothing found that will go wrong or be slow")
    for finding in findings:
        console.print(Text(printable(f"- {finding.problem}")))
        console.print(Text(printable(f"  fix: {finding.fix}")))


Rows = list[tuple[str, str]]


def _device_rows(facts: Facts) -> Rows:
    if not facts.devices:
        return [("device", "CPU; no CUDA device" + (f", driver {facts.cuda_driver}" if facts.cuda_driver else ""))]
    rows = []
    for index, device in enumerate(facts.devices):
        kind = "integrated, " if device.integrated else ""
        memory = f"{_gib(device.free_bytes)} of {_gib(device.total_bytes)} free"
        sms = f"{device.multiprocessors} SMs"
        rows.append((f"cuda:{index}", f"{device.name} ({kind}{_capability(device)}, {sms}), {memory}"))
    return [*rows, ("driver", facts.cuda_driver or "not found")]


def _host_rows(facts: Facts) -> Rows:
    host = facts.host
    swap = f"swap {_gib(host.swap_bytes)}" if host.swap_bytes else "no swap"
    return [
        ("CPU", f"{host.cpu}, {host.cpus} usable, {host.torch_threads} threads of torch"),
        ("RAM", f"{_gib(host.available_bytes)} of {_gib(host.total_bytes)} available, {swap}"),
    ]


def _jetson_rows(facts: Facts) -> Rows:
    if facts.jetson is None:
        return []
    clock = facts.jetson.gpu_clock
    rows = [
        ("Jetson Linux", facts.jetson.release or "unknown"),
        ("power mode", facts.jetson.power_mode or "unknown"),
    ]
    if clock is not None:
        now, low, high = (
            f"{hz / 1e6:.0f}" if hz is not None else "?" for hz in (clock.current, clock.lowest, clock.highest)
        )
        rows.append(("GPU clock", f"{now} MHz ({low} to {high}), governor {clock.governor or 'unknown'}"))
    temperatures = ", ".join(f"{zone} {value:.0f} °C" for zone, value in facts.jetson.temperatures.items())
    return [*rows, ("temperatures", temperatures)] if temperatures else rows


def _version_rows(facts: Facts) -> Rows:
    rows = [(name, version or "not installed") for name, version in facts.versions.items()]
    built = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU build"
    architectures = " ".join(facts.torch_architectures)
    return [*rows, ("torch built for", f"{built} {architectures}".strip())]


def _tool_rows(facts: Facts) -> Rows:
    tools = facts.tools
    rows = [
        ("C++ compiler", tools.cxx or f"{tools.cxx_wanted} not found"),
        ("Python.h", tools.python_header or "missing"),
    ]
    return [*rows, ("ptxas", tools.ptxas or "not found")] if facts.devices or facts.torch_cuda else rows


def _cache_rows(facts: Facts) -> Rows:
    cache = facts.cache
    return [("compile cache", f"{cache.entries} entries, {cache.bytes / 1e6:.1f} MB in {cache.directory}")]


def _environment_rows(facts: Facts) -> Rows:
    return [(name, value) for name, value in facts.environment.items()]


SECTIONS: tuple[Callable[[Facts], Rows], ...] = (
    _device_rows,
    _host_rows,
    _jetson_rows,
    _version_rows,
    _tool_rows,
    _cache_rows,
    _environment_rows,
)


def _capability(device: Device) -> str:
    return f"sm_{device.capability[0]}{device.capability[1]}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
