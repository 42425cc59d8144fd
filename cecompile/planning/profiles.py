"""Devices whose time per phase can be estimated, from public figures. No real device is queried."""

from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Profile:
    """A device and its host. The host defaults to a present x86-64 server."""

    title: str  # the device's full name
    peak_flops: float  # dense matrix rate in bfloat16 or float16 with float32 accumulation, FLOP/s
    reached: float  # the share of `peak_flops` that large linear layers reach
    peak_bandwidth: float  # of device memory, bytes/s
    bandwidth_reached: float  # the share of `peak_bandwidth` that elementwise kernels reach
    memory: float  # bytes that a process can allocate on the device, or where `unified`, that the system leaves it
    source: str  # where the figures come from
    storage_rate: float = 3e9  # reading a checkpoint and placing it on the device, bytes/s; an assumption everywhere
    host_speed: float = 1.0  # speed of a CPU core relative to the server's; an assumption but for h100
    layer_overhead: float = 20e-6  # seconds that launching a layer's kernels from a graph adds; an assumption
    unified: bool = False  # whether the memory is the host's too
    desktop: float = 0.0  # bytes that a desktop takes of unified memory; without a desktop they are in `memory`

    @property
    def matrix_rate(self) -> float:
        """FLOP/s that linear layers reach."""
        return self.peak_flops * self.reached

    @property
    def bandwidth(self) -> float:
        """Bytes/s that elementwise kernels reach."""
        return self.peak_bandwidth * self.bandwidth_reached


# 56 tensor cores x 512 FLOP a clock x 930.75 MHz at MAXN. PyTorch reached 62 % on an Orin Nano; others' decoding
# speeds imply 165 GB/s. CUDA sees 30,698 MiB, of which the system takes some 1.3 GB, and with a desktop 2.8 GB.
_ORIN_32GB = Profile(
    "Jetson AGX Orin 32GB at MAXN",
    peak_flops=56 * 512 * 930.75e6, reached=0.62, peak_bandwidth=204.8e9, bandwidth_reached=0.8,
    memory=30_698 * 2**20 - 1.3e9, storage_rate=1.5e9, host_speed=0.4, layer_overhead=60e-6,
    unified=True, desktop=1.5e9,
    source="NVIDIA Jetson AGX Orin Series data sheet; shares reached: public reports for Orin devices",
)  # fmt: skip
# 64 tensor cores at 1.3 GHz. CUDA is assumed to see the same share of the memory as in the 32GB module.
_ORIN_64GB = replace(
    _ORIN_32GB, title="Jetson AGX Orin 64GB at MAXN",
    peak_flops=64 * 512 * 1.3e9, memory=2 * 30_698 * 2**20 - 1.3e9,
)  # fmt: skip
# GeForce cards halve the matrix rate when accumulating in float32: 165.2 TFLOP/s. The shares are assumptions.
_RTX_4090 = Profile(
    "GeForce RTX 4090",
    peak_flops=165.2e12, reached=0.85, peak_bandwidth=1008e9, bandwidth_reached=0.85, memory=24 * GIB,
    source="NVIDIA Ada GPU Architecture white paper; shares reached: assumed",
)  # fmt: skip
_A100 = Profile(
    "A100 SXM 80GB",
    peak_flops=312e12, reached=0.75, peak_bandwidth=2039e9, bandwidth_reached=0.85, memory=80 * GIB,
    source="NVIDIA A100 data sheet; shares reached: assumed",
)  # fmt: skip
# 680 to 700 TFLOP/s in linear layers alone, and 3.1 TB/s in the product after SiLU, were measured with this engine.
_H100 = Profile(
    "H100 SXM 80GB",
    peak_flops=989e12, reached=0.70, peak_bandwidth=3.35e12, bandwidth_reached=0.92, memory=80 * GIB,
    source="NVIDIA H100 data sheet; shares reached: measured",
)  # fmt: skip
# The H100's chip with faster memory. The shares are assumed to be the H100's.
_H200 = replace(
    _H100, title="H200 SXM 141GB", peak_bandwidth=4.8e12, memory=141e9,
    source="NVIDIA H200 data sheet; shares reached: as measured on an H100",
)  # fmt: skip
PROFILES = {
    "orin-32gb": _ORIN_32GB, "orin-64gb": _ORIN_64GB, "rtx-4090": _RTX_4090, "a100-80gb": _A100, "h100": _H100,
    "h200": _H200,
}  # fmt: skip
