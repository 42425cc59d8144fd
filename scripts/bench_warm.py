"""Warm-up with an empty compile cache against warm-up with a filled one, each run a process of its own.

    python scripts/bench_stream.py --make llama-7b --model /dev/shm/7b --tokenizer DIR
    python scripts/bench_warm.py --model /dev/shm/7b --data hellaswag_val.jsonl --limit 1000

A round is one run that finds its cache empty and --warm runs that find what the first has left. Rounds begin anew with
another cache: from the second on, all files that a process reads are in the page cache. Exit status 1 where samples
are not the same, byte for byte, everywhere.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from bench_stream import add_run_arguments, run
from rich.console import Console
from rich.table import Table


def main() -> None:
    options = _arguments()
    table = Table("round", "cache", "load_model", "warmup", "of the cold one", "inference", "wall")
    samples: set[bytes] = set()
    for number in range(options.rounds):
        cold = 0.0
        with tempfile.TemporaryDirectory() as cache:
            for turn in range(1 + options.warm):
                results = run(options, f"{number}-{turn}", "--cache-dir", cache)
                samples.add((options.output / f"{number}-{turn}" / "samples.jsonl").read_bytes())
                phases = results["phases_s"] | {"wall": sum(results["phases_s"].values())}
                cold = cold or phases["warmup"]
                load, warmup, *rest = (
                    f"{phases[name]:.2f} s" for name in ("load_model", "warmup", "inference", "wall")
                )
                cells = (results["cache"]["state"], load, warmup, f"{phases['warmup'] / cold:.3f}", *rest)
                table.add_row(str(number + 1), *cells)
    Console(width=110).print(table)
    said = "the same" if len(samples) == 1 else "NOT the same"
    print(f"samples: {said} in all {options.rounds * (1 + options.warm)}")
    sys.exit(len(samples) > 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, Path("results/warm"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", type=int, default=2, help="runs of a round that find the cache filled")
    return parser.parse_args()


if __name__ == "__main__":
    main()
