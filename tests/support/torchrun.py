"""An evaluation by several ranks, or by one process alone, and whether both give the same."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from cecompile.cli import cli
from cecompile.results.check import problems
from cecompile.results.journal import PASSES, journals_in, read
from support import forked
from support.rank import agent
from support.rows import write_rows
from support.runs import results, run_command, stop_after

RANK = Path(__file__).with_name("rank.py")


def alone(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output


def command(model: Path, data: Path, how: dict[str, object]) -> list[str]:
    """Returns `eval` with options that a scorer or an answerer takes by nearly the same names."""
    names = {"engine": "--engine", "tokens_per_bucket": "--tokens-per-bucket", "new_tokens": "--max-new-tokens"}
    options = [part for name, value in ({"engine": "compiled"} | how).items() for part in (names[name], str(value))]
    return ["eval", "--model", str(model), "--data", str(data), "--device", "cpu", *options]


def alone_and_by(ranks: int, directory: Path, runs: dict[str, dict]) -> None:
    """Runs evaluations by one process, below "alone", then by ranks; checks that both give the same.

    Each of `runs` has `model`, `rows` and `how`, maybe `repeat` and `pipeline`. One process begins "gone on with".
    """
    todo = {}
    for name, run in runs.items():
        data, repeat = write_rows(directory / f"{name}.jsonl", run["rows"]), run.get("repeat", 1)
        one = [*command(run["model"], data, run["how"]), "--repeat", str(repeat), "--output"]
        alone([*one, str(directory / "alone" / name)])
        if name == "gone on with":
            with pytest.MonkeyPatch.context() as patch:
                stop_after(patch, 3)
                run_command(*one, directory / name, exit_code=130)
        how = run["how"] | {"pipeline": run.get("pipeline", 1)}
        todo[name] = {"model": str(run["model"]), "data": str(data), "how": how, "repeat": repeat}
    (directory / "runs.json").write_text(json.dumps(todo))
    done = torchrun(ranks, ["share", str(directory)])
    assert done.returncode == 0, done.stderr
    for name in runs:
        same(directory / "alone" / name, directory / name)
        single, shared = results(directory / "alone" / name), results(directory / name)
        parts = ("engine", "metrics", "plan")
        assert [shared[part] for part in parts] == [single[part] for part in parts]
    assert results(directory / "gone on with")["resumed"]["passes"] == 3


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
