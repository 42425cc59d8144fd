"""An evaluation by several ranks, or by one process alone, and whether both give the same."""

import os
import subprocess
from pathlib import Path

from click.testing import CliRunner

from cecompile.cli import cli
from cecompile.results.check import problems
from cecompile.results.journal import PASSES, journals_in, read
from support import forked
from support.rank import agent

RANK = Path(__file__).with_name("rank.py")


def alone(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output


def environment(**more: object) -> dict[str, str]:
    root = str(RANK.parents[2])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in more.items()}


def torchrun(ranks: int, arguments: list[str], restarts: int = 0, **variables: object) -> subprocess.CompletedProcess:
    return forked.run(agent, (ranks, restarts, arguments), environment(**variables))


def lines(done: subprocess.CompletedProcess) -> list[str]:
    """Returns the ranks' lines on standard error, without torchrun's own."""
    return [line for line in done.stderr.splitlines() if line.startswith("cecompile: ")]


def same(one: Path, other: Path) -> None:
    files = {path.name for path in one.iterdir()} - {"results.json"}
    assert {path.name for path in other.iterdir()} - {"results.json"} == files
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert problems(other) == []


def finished(output: Path) -> set[int]:
    """The passes in all journals there."""
    return {index for path in journals_in(output) for kind, index, *_ in read(path.read_bytes()) if kind == PASSES}
