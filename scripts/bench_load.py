"""Loading a checkpoint against reading its files plainly, what it takes of the host's memory, and reading ahead.

    python scripts/bench_stream.py --make llama-7b --model /data/7b --tokenizer DIR
    python scripts/bench_load.py --model /data/7b

A round reads the files front to back into one buffer, then loads the checkpoint in a process of its own, then once more
in one that begins to read ahead before it imports torch and transformers, as `cecompile eval` does. Before each the
files are put out of the page cache. Printed are the seconds of imports and of loading, loading's rate and its share of
the plain one's, and by how much the process grew while it loaded: resident memory, looked at every 5 ms.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

BLOCK = 8 * 2**20


def main() -> None:
    options = _arguments()
    if options.child:
        print(json.dumps(load(str(options.model), options.device, options.child == "ahead")))
        return
    from rich.console import Console
    from rich.table import Table

    files = sorted(options.model.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    table = Table("round", "", "imports", "load", "GB/s", "of the plain one", "host memory")
    for number in range(1, options.rounds + 1):
        out_of_the_page_cache(files)
        plain = size / read_plainly(files)
        table.add_row(str(number), "read plainly", "", f"{size / plain:.2f} s", f"{plain / 1e9:.2f}", "", "")
        for way in ("load", "ahead"):
            out_of_the_page_cache(files)
            command = [sys.executable, __file__, "--model", str(options.model), "--device", options.device]
            done = subprocess.run([*command, "--child", way], check=True, stdout=subprocess.PIPE, text=True)
            seen = json.loads(done.stdout)
            rate = size / seen["load"]
            times = (f"{seen['imports']:.2f} s", f"{seen['load']:.2f} s", f"{rate / 1e9:.2f}")
            name = "load" if way == "load" else "load, read ahead"
            table.add_row(str(number), name, *times, f"{rate / plain:.3f}", f"{seen['grown'] / 1e9:.2f} GB")
    Console(width=100).print(table)


def out_of_the_page_cache(files: list[Path]) -> None:
    """As far as the system does so for who asks."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(files: list[Path]) -> float:
    """Seconds."""
    began, buffer = time.perf_counter(), bytearray(BLOCK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - began


def load(model: str, device: str, ahead: bool) -> dict[str, float]:
    """Seconds of imports and of loading, and bytes by which resident memory grew at most while loading."""
    from cecompile.model import prefetch
    from cecompile.procfs import read_status

    began = time.perf_counter()
    if ahead:
        prefetch.begin(model)
    import torch

    from cecompile.model.checkpoint import load_checkpoint, load_config
    from cecompile.run import evaluation  # noqa: F401  (imports all that a run does)
    from cecompile.run.language_model import resolve_device

    config, where = load_config(model), resolve_device(device)
    torch.zeros(1, device=where)
    imported, before, most = time.perf_counter(), read_status()["VmRSS"], 0
    over = threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, read_status()["VmRSS"])

    looking = threading.Thread(target=look)
    looking.start()
    loaded = load_checkpoint(model, config, "auto", where)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    done = time.perf_counter()
    over.set()
    looking.join()
    assert loaded.fallback is None, loaded.fallback
    held = sum(p.nbytes for p in loaded.model.parameters()) if where.type == "cpu" else 0
    return {"imports": imported - began, "load": done - imported, "grown": most - before - held}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, on a disk")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("load", "ahead"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
