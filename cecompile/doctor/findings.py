"""Faults of this machine that stop a run or slow a run down, each with its fix."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cecompile.doctor.machine import Device, Facts
from cecompile.errors import printable

GIB = 2**30
LITTLE_MEMORY = 4 * GIB  # free memory below which models of a few billion parameters do not fit
SLOWER = "models run uncompiled, and slower"
Pairs = Iterator[tuple[str, str]]  # of a check: problem and fix; of a table: name and value


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and its fix, one line each."""

    problem: str
    fix: str


def judge(facts: Facts) -> list[Finding]:
    """The findings, those that stop a run first."""
    return [Finding(problem, fix) for check in CHECKS for problem, fix in check(facts)]


def _check_driver(facts: Facts) -> Pairs:
    if facts.devices or facts.cuda_driver is None:
        return
    found = f"the CUDA driver is there ({facts.cuda_driver}), but"
    if facts.torch_cuda is None:
        fix = "install a CUDA build of torch (pytorch.org/get-started), on a Jetson the one of its container"
        yield f"{found} this torch is a CPU build", fix
    else:
        recent = f"that the driver is recent enough for CUDA {facts.torch_cuda}"
        fix = f"check CUDA_VISIBLE_DEVICES, {recent}, and a container's --gpus all or --runtime nvidia"
        yield f"{found} torch sees no device", fix


def _check_kernels(facts: Facts) -> Pairs:
    built = " ".join(facts.torch_architectures)
    jetson = "JetPack 6: use the container nvcr.io/nvidia/pytorch:25.06-py3-igpu; later ones may run it all the same"
    for device in facts.devices:
        if built and not has_kernels(device, facts.torch_architectures):
            fix = jetson if device.integrated else "install a build of torch for it"
            name = f"{device.name} ({_capability(device)})"
            yield f'torch is built for {built}, not for {name}: "no kernel image" may follow', fix


def has_kernels(device: Device, architectures: tuple[str, ...]) -> bool:
    """Whether a build for these architectures runs on the device.

    Machine code (sm_) runs on its major version from its minor version up, but not across to an integrated GPU.
    A name that ends in "a" runs on exactly its version. Intermediate code (compute_) is compiled for any later version.
    See "Binary Compatibility" in the CUDA C++ Programming Guide.
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


def check_compiler(facts: Facts) -> Pairs:
    tools = facts.tools
    if tools.cxx is None:
        clang = "set CXX=clang++, or " if tools.clang else ""
        problem = f"no C++ compiler ({tools.cxx_wanted or 'CXX is empty'}): {SLOWER}"
        yield problem, f"{clang}install g++: sudo apt-get install g++"
    elif tools.python_header is None:
        problem = f"Python.h is missing, which compiled kernels include: {SLOWER}"
        yield problem, "install Python's headers: sudo apt-get install python3-dev"


def check_triton(facts: Facts) -> Pairs:
    tools, given = facts.tools, facts.environment.get("TRITON_PTXAS_PATH")
    if not facts.devices:
        return
    if facts.versions["triton"] is None:
        problem = f"Triton is missing: nothing compiles for the GPU, {SLOWER}"
        yield problem, "pip install triton, or use a container that has it"
    elif tools.ptxas is None:
        problem = f"ptxas is missing: Triton builds no kernels, {SLOWER}"
        yield problem, "install the CUDA toolkit and set TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas"
    else:
        fix = "export TRITON_PTXAS_PATH=" + re.sub(r" [\d.]+$", "", tools.ptxas)  # the path, without the version
        if given and tools.ptxas_by != "TRITON_PTXAS_PATH":
            yield f"TRITON_PTXAS_PATH={given}: there is no such file", fix
        elif tools.ptxas_by == "toolkit":
            yield "Triton comes without ptxas: it builds no kernels", fix


def _check_memory(facts: Facts) -> Pairs:
    close, host = "close other programs", facts.host
    for device in facts.devices:
        if device.free_bytes < LITTLE_MEMORY:
            fix = f"{close}; without a desktop there is about 1.5 GB more" if device.integrated else f"{close} on it"
            yield f"{device.name}: {_gib(device.free_bytes)} free", fix
    if not facts.devices and host.available_bytes < LITTLE_MEMORY:
        yield f"{_gib(host.available_bytes)} of memory available", close
    if host.swap_bytes and any(device.integrated for device in facts.devices):
        fix = "count on free memory only: sudo systemctl isolate multi-user.target frees more"
        yield f"the {_gib(host.swap_bytes)} of swap cannot hold CUDA memory", fix


def check_allocator(facts: Facts) -> Pairs:
    failing = re.compile(r"expandable_segments:\s*true|cudaMallocAsync", re.IGNORECASE)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = facts.environment.get(name, "")
        if failing.search(value) and any(device.integrated for device in facts.devices):
            yield f"{name}={value}: fails on an integrated GPU", f"unset {name}; the native allocator works"


def _check_jetson(facts: Facts) -> Pairs:
    jetson = facts.jetson
    if jetson is None:
        return
    if jetson.power_mode is None:
        problem = "the power mode is not known (no nvpmodel): below MAXN, times are not comparable"
        yield problem, "on the Jetson itself, outside of a container: sudo nvpmodel -q"
    elif not jetson.power_mode.upper().startswith("MAXN"):
        yield f"power mode {jetson.power_mode}, below MAXN: slower, and times are not comparable", "sudo nvpmodel -m 0"
    if jetson.gpu_clock is None or not jetson.gpu_clock.pinned:
        yield "clocks are not pinned: times vary", "sudo jetson_clocks"


def _check_cache(facts: Facts) -> Pairs:
    if facts.cache.refused:
        problem, _, fix = facts.cache.refused.rpartition(": ")
        yield problem, fix
    for problem in facts.cache.damaged:  # none where the directory is refused
        yield f"compile cache: {problem}", "cecompile warm --prune"


CHECKS: tuple[Callable[[Facts], Pairs], ...] = (
    _check_driver, _check_kernels, check_compiler, check_triton, _check_cache, _check_memory, check_allocator,
    _check_jetson,
)  # fmt: skip


def as_json_object(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """The fields of `Facts`, and `findings`: a list of {problem, fix}. Memory in bytes, clocks in Hz."""
    return dataclasses.asdict(facts) | {"findings": [dataclasses.asdict(f) for f in findings]}


def print_doctor(console: Console, facts: Facts, findings: list[Finding]) -> None:
    """Prints the facts as a table, then the findings."""
    table = Table(Column(style="bold"), Column(), show_header=False, box=None, padding=(0, 2, 0, 0))
    for rows in (_device_rows, _host_rows, _jetson_rows, _software_rows):
        for name, value in rows(facts):
            table.add_row(name, Text(printable(value)))
    console.print(table)
    if not findings:
        console.print("nothing found that will go wrong or be slow")
    for finding in findings:
        console.print(Text(printable(f"- {finding.problem}")))
        console.print(Text(printable(f"  fix: {finding.fix}")))


def _device_rows(facts: Facts) -> Pairs:
    if not facts.devices:
        yield "device", "CPU; no CUDA device" + (f", driver {facts.cuda_driver}" if facts.cuda_driver else "")
        return
    for index, device in enumerate(facts.devices):
        kind = ("integrated, " if device.integrated else "") + _capability(device)
        memory = f"{_gib(device.free_bytes)} of {_gib(device.total_bytes)} free"
        yield f"cuda:{index}", f"{device.name} ({kind}, {device.multiprocessors} SMs), {memory}"
    yield "driver", facts.cuda_driver or "not found"


def _host_rows(facts: Facts) -> Pairs:
    host = facts.host
    yield "CPU", f"{host.cpu}, {host.cpus} usable, {host.torch_threads} threads of torch"
    swap = f"swap {_gib(host.swap_bytes)}" if host.swap_bytes else "no swap"
    yield "RAM", f"{_gib(host.available_bytes)} of {_gib(host.total_bytes)} available, {swap}"


def _jetson_rows(facts: Facts) -> Pairs:
    jetson = facts.jetson
    if jetson is None:
        return
    yield "Jetson Linux", jetson.release or "unknown"
    yield "power mode", jetson.power_mode or "unknown"
    clock = jetson.gpu_clock
    if clock is not None:
        hertz = (clock.current, clock.lowest, clock.highest)
        now, low, high = ("?" if value is None else f"{value / 1e6:.0f}" for value in hertz)
        yield "GPU clock", f"{now} MHz ({low} to {high}), governor {clock.governor or 'unknown'}"
    if jetson.temperatures:
        yield "temperatures", ", ".join(f"{zone} {value:.0f} °C" for zone, value in jetson.temperatures.items())


def _software_rows(facts: Facts) -> Pairs:
    tools, cache = facts.tools, facts.cache
    for name, version in facts.versions.items():
        yield name, version or "not installed"
    built = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU build"
    yield "torch built for", " ".join([built, *facts.torch_architectures])
    yield "C++ compiler", tools.cxx or f"{tools.cxx_wanted} not found"
    yield "Python.h", tools.python_header or "missing"
    if facts.devices or facts.torch_cuda:
        yield "ptxas", tools.ptxas or "not found"
    yield "compile cache", f"{cache.entries} entries, {cache.bytes / 1e6:.1f} MB in {cache.directory}"
    yield from facts.environment.items()


def _capability(device: Device) -> str:
    return f"sm_{device.capability[0]}{device.capability[1]}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
