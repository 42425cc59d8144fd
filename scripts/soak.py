"""Long runs of bad luck: killed at random moments and resumed; again and again in one process, and as commands.

    python scripts/soak.py kill --kills 50 --rows 2000
    python scripts/soak.py repeat --runs 200 --commands 30

Both exit with status 1 if something is not as it must be. The engine is the uncompiled one on one thread: cheap, and
what is tested here is the same for all. With --reload memory grows: of what a tokenizer
has cached, tokenizers 0.23 keeps about 2 MB when it is dropped, with nothing else in the process as well.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cecompile import demo
from cecompile.results import journal

SAMPLES = "samples.jsonl"


def main() -> int:
    """Runs what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    kill = modes.add_parser("kill", help="SIGKILL at random moments, each run resumed and compared")
    kill.add_argument("--kills", type=int, default=50)
    kill.add_argument("--rows", type=int, default=2000)
    kill.add_argument("--tokens-per-bucket", type=int, default=512)
    kill.add_argument("--seed", type=int, default=0)
    repeat = modes.add_parser("repeat", help="the demo again and again: memory, files, processes, results")
    repeat.add_argument("--runs", type=int, default=200, help="in one process, through the Python API")
    repeat.add_argument("--commands", type=int, default=30)
    repeat.add_argument("--reload", action="store_true", help="a new model and tokenizer for every run of --runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cecompile-soak-") as directory:
        return soak_kill(Path(directory), options) if options.mode == "kill" else soak_repeat(Path(directory), options)


def soak_kill(directory: Path, options: argparse.Namespace) -> int:
    """Kills a run at a random moment, resumes it, compares; again and again."""
    # Children are forked from here: with all that a run imports, and before anything has been computed.
    import cecompile.cli
    import cecompile.report.table
    import cecompile.run.answerer
    import cecompile.run.evaluation  # noqa: F401

    data = directory / "rows.jsonl"
    known = [json.loads(line) for line in demo.HELLASWAG.read_text().splitlines()]
    rows = ((number, known[number % len(known)]) for number in range(options.rows))
    data.write_text("".join(json.dumps(row | {"ctx_a": f"{i}. {row['ctx_a']}"}) + "\n" for i, row in rows))
    arguments = ["eval", "--data", str(data), "--device", "cpu", "--engine", "eager"]
    arguments += ["--tokens-per-bucket", str(options.tokens_per_bucket)]
    began = time.monotonic()
    whole = Run(directory, "whole", arguments)
    if whole.wait() != 0:
        raise SystemExit("the uninterrupted run failed")
    seconds = time.monotonic() - began
    expected = (directory / "whole" / SAMPLES).read_bytes()
    print(f"{options.rows} rows, {whole.begun()} passes, {seconds:.2f} s uninterrupted")
    moments = random.Random(options.seed)
    identical = unstarted = finished = worst = 0
    for number in range(options.kills):
        moment = moments.uniform(0, seconds)
        name = f"run{number}"
        killed, output = Run(directory, name, arguments), directory / name
        killed.kill_after(moment)
        there = output / journal.NAME in journal.journals_in(output)
        records = len(list(journal.read((output / journal.NAME).read_bytes()))) if there else 0
        kept = max(0, records - 1)  # the first record is the header
        if not there and (output / "results.json").exists():
            finished += 1
        elif not records:
            unstarted += 1
        recomputed = killed.begun() - kept if there else 0
        worst = max(worst, recomputed)
        again = Run(directory, name, [*arguments, "--resume" if records else "--overwrite"])
        same = again.wait() == 0 and (output / SAMPLES).read_bytes() == expected
        clean = (left := sorted(p.name for p in output.iterdir())) == ["results.json", SAMPLES]
        identical += same and clean
        print(
            f"kill {number + 1} at {moment:.2f} s: {kept} passes kept, {recomputed} recomputed, "
            f"{again.begun()} run after; {'identical' if same else 'NOT IDENTICAL'}{'' if clean else f', left {left}'}"
        )
        shutil.rmtree(output)
    early = f"{unstarted} killed before there was a journal, {finished} after the end"
    print(f"{identical} of {options.kills} identical, at most {worst} passes recomputed; {early}")
    return 0 if identical == options.kills and worst <= 1 else 1


class Run:
    """`cecompile` in a process of its own, forked from this one; notes every pass it begins."""

    def __init__(self, directory: Path, name: str, arguments: list[str]) -> None:
        self._notes = directory / f"{name}.begun"
        self._notes.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            self._work(directory, [*arguments, "--output", str(directory / name)])

    def wait(self) -> int:
        """The exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill_after(self, seconds: float) -> None:
        """SIGKILL, unless it has ended by then."""
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def begun(self) -> int:
        """How many passes it has begun to run."""
        return self._notes.stat().st_size if self._notes.exists() else 0

    def _work(self, directory: Path, arguments: list[str]) -> None:
        """In the child. Does not return."""
        from cecompile import cli
        from cecompile.engine import forward

        notes = os.open(self._notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        quiet = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        run = forward.Engine.run

        def noted(self, passes, done=None):  # type: ignore[no-untyped-def]
            def each():  # type: ignore[no-untyped-def]
                for one in passes:
                    os.write(notes, b".")
                    yield one

            checks = done is None  # the warm-up does, and journals nothing
            return run(self, passes) if checks else run(self, each(), done)

        forward.Engine.run = noted  # type: ignore[method-assign]
        sys.argv = ["cecompile", *arguments]
        cli.main()


def soak_repeat(directory: Path, options: argparse.Namespace) -> int:
    """The demo many times: through the Python API in this process, then as commands."""
    from cecompile import Scorer

    os.environ["TMPDIR"] = str(directory / "tmp")
    (directory / "tmp").mkdir()
    tempfile.tempdir = None
    wrong, outputs, scorer = [], set(), None
    sizes, peaks = [], []
    for _ in range(options.runs):
        if scorer is None or options.reload:
            scorer = Scorer.from_pretrained(device="cpu", engine="eager")
        size, samples = api_run(scorer, directory / "api")
        sizes.append(size)
        outputs.add(samples)
    if sizes:
        base, last = sizes[min(9, len(sizes) - 1)], sizes[-1]
        grown = f"{last / 1e6:.1f} MB after the last ({100 * (last / base - 1):+.2f} %)"
        print(f"{options.runs} runs in one process: {base / 1e6:.1f} MB after the tenth, ", end="")
        print(f"{grown}, {len(outputs)} different results")
        if abs(last / base - 1) > 0.05 or len(outputs) > 1:
            wrong.append("runs in one process")
    of_commands = set()
    for number in range(options.commands):
        peak, samples = command_run(directory / "command")
        peaks.append(peak)
        of_commands.add(samples)
        print(f"command {number + 1}: peak {peak / 1e6:.1f} MB", flush=True)
    if peaks:
        least, most = min(peaks), max(peaks)
        print(f"{options.commands} commands: peaks from {least / 1e6:.1f} to {most / 1e6:.1f} MB, ", end="")
        print(f"{len(of_commands)} different results")
        if most / least > 1.05 or len(outputs | of_commands) > 1:
            wrong.append("commands")
    left = [str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    print(f"files left: {left or 'none'}; processes left: {children or 'none'}")
    if left or children:
        wrong.append("leftovers")
    print("all as it must be" if not wrong else f"WRONG: {', '.join(wrong)}")
    return 1 if wrong else 0


def api_run(scorer: Any, output: Path) -> tuple[int, bytes]:
    """One evaluation of the demo: this process's memory after it, in bytes, and the samples."""
    from cecompile import evaluate, read_questions
    from cecompile.procfs import read_status
    from cecompile.results.journal import Journal

    with Journal(output) as journaled:
        evaluate(scorer, read_questions(demo.HELLASWAG), output=output, journal=journaled)
    samples = (output / SAMPLES).read_bytes()
    shutil.rmtree(output)
    return read_status()["VmRSS"], samples


def command_run(output: Path) -> tuple[int, bytes]:
    """The same as a command: its peak memory in bytes, and the samples."""
    command = [sys.executable, "-m", "cecompile", "eval", "--device", "cpu", "--engine", "eager"]
    process = subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.DEVNULL)
    if process.wait():
        raise SystemExit(f"a command failed with status {process.returncode}")
    samples = (output / SAMPLES).read_bytes()
    peak = json.loads((output / "results.json").read_text())["memory"]["peak_bytes"]
    shutil.rmtree(output)
    return peak, samples


if __name__ == "__main__":
    sys.exit(main())
