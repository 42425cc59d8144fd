"""Memory limits from too little to plenty: each run finishes within its limit, or is refused before anything is loaded.

    python scripts/bench_stream.py --make phi3-medium --model /dev/shm/14b --tokenizer DIR
    python scripts/bench_memory.py --model /dev/shm/14b --data chats.jsonl --task chat --max-new-tokens 8 \\
        --limits 5 20 26 27 31.82 36.64 41.45 46.27 51.09 55.91 60.73 65.55 70.36 75.18 80

Per limit, in GB: the exit status, the predicted peak and the measured one, their ratio, the largest bucket, and the
line that a refused run has said. Exit status 1 where a run neither finished nor was refused (2), took more than its
limit, or was predicted 10 % off.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

TOLERANCE = 0.1  # by which a prediction may be off


def main() -> None:
    options, more = _arguments()
    table = Table("limit", "exit", "predicted", "peak", "predicted / peak", "largest bucket", "said")
    broken = 0
    for limit in options.limits:
        out = options.output / f"{limit:g}"
        command = [sys.executable, "-m", "cecompile", "eval", "--memory-limit", f"{limit}GB", *more]
        done = subprocess.run(
            [*command, "--output", str(out), "--overwrite"], capture_output=True, text=True, check=False
        )
        row = [f"{limit:g} GB", str(done.returncode)]
        if done.returncode:
            broken += done.returncode != 2
            table.add_row(*row, "", "", "", "", done.stderr.strip().rsplit("\n", 1)[-1])
            continue
        results = json.loads((out / "results.json").read_text())
        memory, bucket = results["memory"], results["plan"]["buckets"][0]
        predicted, peak = memory["predicted_bytes"], memory["peak_bytes"]
        broken += peak > memory["limit_bytes"] or abs(predicted / peak - 1) > TOLERANCE
        sizes = f"{predicted / 1e9:.3f} GB", f"{peak / 1e9:.3f} GB", f"{predicted / peak:.3f}"
        table.add_row(*row, *sizes, f"{bucket['rows']} x {bucket['length']}", results["engine"]["note"] or "")
    Console(width=140).print(table)
    sys.exit(broken > 0)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options go to cecompile eval.",
    )  # fmt: skip
    parser.add_argument("--limits", type=float, nargs="+", required=True, help="GB")
    parser.add_argument("--output", type=Path, default=Path("results/memory"))
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
