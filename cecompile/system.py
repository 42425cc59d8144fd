"""What the system says of itself, in small files under /proc and /sys."""

import re
from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str | None:
    """A small file's text; None if it cannot be read, as some sensors cannot while their part is switched off."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def read_meminfo(root: Path = ROOT) -> dict[str, int]:
    """/proc/meminfo in bytes, by name."""
    return _read_kib(root / "proc/meminfo")


def read_status(root: Path = ROOT) -> dict[str, int]:
    """The sizes in /proc/self/status in bytes, by name."""
    return _read_kib(root / "proc/self/status")


def cpu_model(root: Path = ROOT) -> str | None:
    """The processor's name; None where /proc/cpuinfo has none, as on many Arm systems."""
    match = re.search(r"^model name\s*: (.+)$", read_text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else None


def _read_kib(path: Path) -> dict[str, int]:
    text = read_text(path) or ""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
