"""The facts on which compiled code depends, for the compile cache's key."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parents[1]
_IDLE = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation"}
# Modules that change compiled code or its inputs. Modules that only plan, load, store or show are left out, so that an
# update of those leaves users' caches warm.
SOURCES = (
    "engine", "workload", "partitioned", "model/structure.py", "model/support.py", "model/layer_layout.py",
)  # fmt: skip


def compile_facts(config: Any, dtype: str, device: torch.device, attention: str, readout_chunk: int) -> dict[str, Any]:
    """Everything that changes the compiled code except the bucket shapes, as plain JSON values.

    `dtype` and `attention` are the caller's choices; `readout_chunk` counts the readouts whose logits are held at once.
    """
    text = repr(sorted((k, v) for k, v in config.to_dict().items() if k not in _IDLE))
    model = f"{config.model_type} {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    dtype = str(getattr(config, "dtype", None)).removeprefix("torch.") if dtype == "auto" else dtype
    facts = {"model": model, "dtype": dtype, "attention": attention, "readout_chunk": readout_chunk}
    return facts | {"device": _device(device), "versions": _versions(), "engine": source_digest()}


def _versions() -> dict[str, str]:
    out = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "transformers", "triton"):
        out[name] = "none"
        with suppress(metadata.PackageNotFoundError):
            out[name] = metadata.version(name)
    return out


def _device(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = f"{found.major}.{found.minor}"
        return {"name": found.name, "capability": capability, "cuda": str(torch.version.cuda)}
    kind = {"name": "cpu", "machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
    return kind | {"threads": str(torch.get_num_threads()), "compiler": _compiler()}


@functools.cache
def _compiler() -> str:
    """The first line of the C++ compiler's `--version`, or "none"."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        return "none"
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["none"])[0]


@functools.cache
def source_digest(package: Path = PACKAGE) -> str:
    """A digest of the modules that make the compiled code and its inputs."""
    digest = hashlib.sha256()
    for path in hashed_files(package):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def hashed_files(package: Path) -> list[Path]:
    """The files of SOURCES, sorted; all Python files of each folder there."""
    places = [package / name for name in SOURCES]
    return sorted(file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place]))


def is_outdated(facts: dict[str, Any]) -> bool:
    """Whether `facts` name other versions of libraries or of this engine than the running ones."""
    return facts.get("versions") != _versions() or facts.get("engine") != source_digest()
