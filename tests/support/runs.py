"""Runs of the command line, in this process or another, whole or stopped by a signal; results that they wrote."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cecompile.cli import cli
from cecompile.results.journal import Journal
from support.rows import CHATS, ROWS, write_rows

HOW = {
    "trees": (ROWS, ["--engine", "eager", "--tokens-per-bucket", "256"], 3),
    "reference": (ROWS[:6], ["--engine", "reference"], 7),
    "chats": (CHATS, ["--engine", "eager", "--tokens-per-bucket", "256", "--max-new-tokens", "6"], 1),
    "decoded": (CHATS, ["--engine", "eager", "--tokens-per-bucket", "256", "--max-new-tokens", "6"], 9),
    "chats, reference": (CHATS[:4], ["--engine", "reference", "--max-new-tokens", "4"], 2),
}


def run_command(*arguments: object, exit_code: int = 0) -> str:
    """Runs the command line in this process; checks the exit status and returns the output."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def run_process(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process that must end well."""
    command = [sys.executable, "-m", "cecompile", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
    assert done.returncode == 0, done.stderr
    return done


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def json_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(directory: Path) -> list[dict]:
    return json_lines(directory / "samples.jsonl")


def run_script(path: Path, *arguments: object) -> int:
    """Runs a Python script in this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [path.name, *map(str, arguments)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


class Runs:
    """`eval` of one model and file, in this process, as it is or stopped by a signal after some records."""

    def __init__(self, directory: Path, model: Path, rows, *how: object) -> None:
        self.data = write_rows(directory / "rows.jsonl", rows)
        self.directory = directory
        self.arguments = ["--model", str(model), "--data", str(self.data), "--device", "cpu", *map(str, how)]

    def __call__(self, output: str, *more: object, **options):
        to = str(self.directory / output)
        return CliRunner().invoke(cli, ["eval", *self.arguments, "--output", to, *map(str, more)], **options)

    def stopped(self, output: str, records: int, *more: object, number: int = signal.SIGINT):
        """Runs until so many records are in the journal, then sends this process a signal."""
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, records, number)
            return self(output, *more)

    def patched(self, output: str, *attribute: object):
        """Runs while an attribute is replaced; the arguments are those of `monkeypatch.setattr`."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*attribute)
            return self(output)

    def go_on(self, output: str) -> dict | None:
        """Resumes a run to its end; checks the samples against those of "whole"; returns the counts of records kept."""
        done = self(output, "--resume")
        assert done.exit_code == 0, done.output
        assert self.samples(output) == self.samples("whole")
        return self.results(output)["resumed"]

    def samples(self, output: str) -> bytes:
        return (self.directory / output / "samples.jsonl").read_bytes()

    def results(self, output: str) -> dict:
        return results(self.directory / output)


def whole_run(directory: Path, model: Path, kind: str) -> Runs:
    """A kind of run whose results, without a stop, are in "whole"."""
    rows, how, _ = HOW[kind]
    run = Runs(directory, model, rows, *how)
    done = run("whole")
    assert done.exit_code == 0, done.output
    return run


def stop_after(monkeypatch, records: int, number: int = signal.SIGINT) -> None:
    """A real signal to this process once so many records are in the journal."""
    add = Journal.add

    def add_and_stop(self, *record):
        add(self, *record)
        if self._added == records:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Journal, "add", add_and_stop)
