"""The files and tools of a Jetson AGX Orin 32GB, and the facts that doctor reads from them."""

from dataclasses import replace
from pathlib import Path

from cecompile.doctor.findings import GIB
from cecompile.doctor.machine import Device, Facts, gather

ORIN_GPU = Device("Orin", (8, 7), 14, True, 30_698 * 2**20, 28 * GIB)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def executable(path: Path, output: str) -> Path:
    write(path, f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)
    return path


FILES = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, "
    "DATE: Thu Sep 18 2025\n# KERNEL_VARIANT: oot",
    "proc/meminfo": "MemTotal:       31434752 kB\nMemFree:         1048576 kB\nMemAvailable:   27262976 kB\n"
    "SwapTotal:      15717376 kB\nHugePages_Total:       0",
    "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd42",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    **{f"sys/class/devfreq/17000000.gpu/{name}_freq": "930750000" for name in ("cur", "min", "max")},
    "sys/class/devfreq/17000000.gpu/governor": "nvhost_podgov",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48968",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": "45218",
}
TOOLS = {
    "bin/nvpmodel": "NV Power Mode: MAXN\n0",
    "bin/g++": "g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0",
    "usr/local/cuda/bin/ptxas": "Cuda compilation tools, release 12.6, V12.6.68",
}


def make_orin(root: Path) -> Path:
    """Writes the files of a Jetson AGX Orin 32GB on Jetson Linux 36.4.7, at MAXN with pinned clocks; tools in `bin`."""
    for name, text in FILES.items():
        write(root / name, text if text.endswith("\0") else text + "\n")
    for name, output in TOOLS.items():
        executable(root / name, output)
    (root / "dev/nvgpu/igpu0").mkdir(parents=True)
    return root


def orin_facts(root: Path, **environment: str) -> Facts:
    """That Jetson's facts, with the GPU and the packages that a container for it has."""
    ptxas = str(root / "usr/local/cuda/bin/ptxas")
    facts = gather(root, {"PATH": str(root / "bin"), "TRITON_PTXAS_PATH": ptxas} | environment)
    host, versions = replace(facts.host, swap_bytes=0), facts.versions | {"triton": "3.3.0"}
    container = {"devices": (ORIN_GPU,), "torch_cuda": "12.9", "torch_architectures": ("sm_87",)}
    return replace(facts, host=host, versions=versions, **container)
