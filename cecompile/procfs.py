"""Facts of the system, from small files under /proc and /sys."""

import os
import re
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")
CGROUP = Path("/sys/fs/cgroup")


def read_text(path: Path) -> str | None:
    """A small file's text; None if unreadable, as some sensors' files are while their part is switched off."""
    with suppress(OSError):
        return path.read_text(errors="replace").strip()
    return None


def read_meminfo(root: Path = ROOT) -> dict[str, int]:
    """/proc/meminfo in bytes, by name."""
    return _read_kib(root / "proc/meminfo")


def read_status() -> dict[str, int]:
    """The sizes in /proc/self/status in bytes, by name."""
    return _read_kib(ROOT / "proc/self/status")


def memory_left() -> int:
    """Bytes that processes may still take: the system's MemAvailable, or less in a container with a limit (cgroup v2).

    The page cache counts as left, because the system gives up the page cache when asked.
    """
    available = read_meminfo().get("MemAvailable")
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, current, stat = (read_text(CGROUP / f"memory.{name}") or "" for name in ("max", "current", "stat"))
    if not limit.isdecimal() or not current.isdecimal():
        return available
    match = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    return min(available, int(limit) - int(current) + (int(match[1]) if match else 0))


def process_age(process: int | str = "self") -> float | None:
    """Seconds since a process began; None where the system does not say.

    Linux gives the start in ticks since boot: field 22 of /proc/PID/stat (proc(5)). A tick is commonly 0.01 seconds.
    """
    with suppress(OSError, AttributeError, IndexError, ValueError):
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    return None


def cpu_model(root: Path = ROOT) -> str | None:
    """The processor's name; None where /proc/cpuinfo has none, as on many Arm systems."""
    match = re.search(r"^model name\s*: (.+)$", read_text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else None


def _read_kib(path: Path) -> dict[str, int]:
    text = read_text(path) or ""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
