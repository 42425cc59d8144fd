"""Runs a cecompile command as on a GPU whose memory is the host's, such as a Jetson's, on another CUDA device.

    python scripts/unified_memory.py --total 30.9GB -- eval --model DIR --data chats.jsonl --task chat

--total is the memory that such a board leaves before the process starts: about 30.9 GB on an AGX Orin 32GB without a
desktop (an estimate). Of it this script takes what is in use on the device, and what this process and its children hold
on the host. As in MemAvailable (proc(5)), files' clean pages do not count: the system drops them when it has to. With
--files they count too. The memory left is looked at ten times a second, and whenever cecompile asks. Printed last is
the lowest figure. Below zero, the board's kernel would have ended the process.
"""

import argparse
import os
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

INTERVAL = 0.1  # seconds
SIZE = re.compile(r"^(\w+): +(\d+) kB$", re.MULTILINE)
DRIVER = re.compile(r"^[0-9a-f]+-[0-9a-f]+ .* /dev/nvidia\S*\n(?:\w+: .*\n)*?Pss: +(\d+) kB", re.MULTILINE)


class Board:
    """A board's memory, as one process and its children use it.

    Args:
        total: bytes that the board leaves before the process starts.
        files: count files' pages too.
    """

    def __init__(self, total: int, files: bool) -> None:
        self._total, self._files = total, files
        self._lock = threading.Lock()
        self.lowest = (total, 0, 0)  # bytes left, used on the device, used on the host

    def memory_left(self) -> int:
        """Bytes left now, at least 0, as `procfs.memory_left` gives them."""
        with self._lock:
            used = 0
            if torch.cuda.is_initialized():
                free, whole = torch.cuda.mem_get_info()
                used = whole - free
            host = sum(self._resident(process) for process in _family())
            self.lowest = min(self.lowest, (self._total - used - host, used, host))
            return max(0, self._total - used - host)

    def _resident(self, process: int) -> int:
        """Bytes that a process holds, each page divided by the processes that share the page; 0 once it has ended."""
        with suppress(OSError):
            folder = Path(f"/proc/{process}")
            with suppress(FileNotFoundError):  # kernels before 4.14 have none
                sizes = dict(SIZE.findall((folder / "smaps_rollup").read_text()))
                if self._files or "Pss_File" not in sizes:
                    return 1024 * int(sizes["Pss"])
                driver = sum(map(int, DRIVER.findall((folder / "smaps").read_text())))
                return 1024 * (int(sizes["Pss_Anon"]) + int(sizes["Pss_Shmem"]) + driver)
            return 1024 * sum(int(size) for name, size in SIZE.findall((folder / "smaps").read_text()) if name == "Pss")
        return 0

    def watch(self) -> None:
        """Looks at the memory until the process ends."""
        while True:
            self.memory_left()
            time.sleep(INTERVAL)


def _family() -> list[int]:
    """This process and all its descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    found = [os.getpid()]
    for one in found:  # grows as it goes
        found += [child for child, parent in parents.items() if parent == one]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", required=True, help="bytes that the board leaves, such as 30.9GB")
    parser.add_argument("--files", action="store_true", help="count files' pages as used")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="arguments of cecompile, after --")
    options = parser.parse_args()
    from cecompile import cli, device, procfs

    board = Board(device.parse_size(options.total), options.files)
    procfs.memory_left = board.memory_left
    device.is_integrated = lambda device: device.type == "cuda"
    leave = os._exit

    def report_and_leave(status: int) -> NoReturn:
        left, used, host = (n / 1e9 for n in board.lowest)
        print(f"lowest left {left:.2f} GB (device {used:.2f}, host {host:.2f}), exit {status}", file=sys.stderr)
        sys.stderr.flush()
        leave(status)

    exit_: Any = report_and_leave
    os._exit = exit_
    threading.Thread(target=board.watch, daemon=True).start()
    sys.argv = ["cecompile", *options.command[options.command[:1] == ["--"] :]]
    cli.main()


if __name__ == "__main__":
    main()
