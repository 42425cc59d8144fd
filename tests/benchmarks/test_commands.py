"""How long commands take, as ratios; see test_speed.py."""

import subprocess
import sys
from pathlib import Path

import pytest
from alternate import assert_at_most, timed
from support.runs import results
from support.waiting import HANG

CECOMPILE = [sys.executable, "-m", "cecompile"]


def run(command: list[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["eval", "--help"], 0), (["eval", "--engine", "what"], 2), (["what"], 2)],
)
def test_help_and_usage_errors_answer_at_once(arguments, status, ratios):
    """In little more time than Python takes to import the parser of options and NumPy."""
    bare = [sys.executable, "-c", "import click, numpy"]
    assert_at_most(2.0, timed(lambda: run([*CECOMPILE, *arguments], status)), timed(lambda: run(bare)), ratios)


@pytest.mark.process
def test_phases_sum_to_the_wall_time_of_the_process(tiny_llama, tmp_path, ratios):
    """Within 1 % or 50 ms: a process writes results.json and ends after it has read its clock for the last time."""
    command = [*CECOMPILE, "eval", "--model", str(tiny_llama), "--device", "cpu", "--engine", "eager"]
    command += ["--limit", "20", "--overwrite", "--output", str(tmp_path)]

    walls = []

    def booked() -> float:
        walls.append(timed(lambda: run(command))())
        return sum(results(tmp_path)["phases_s"].values())

    assert_at_most(1.0, lambda: walls[-1] - max(0.05, 0.01 * walls[-1]), booked, ratios)


@pytest.mark.process
def test_a_warm_cache_is_at_most_a_third_of_the_warm_up(tiny_llama, tmp_path, ratios):
    command = [
        *CECOMPILE,
        "eval",
        "--engine",
        "compiled",
        "--model",
        str(tiny_llama),
        "--device",
        "cpu",
        "--limit",
        "8",
    ]
    caches: list[Path] = []

    def warm_up(cache: Path, state: str) -> float:
        output = tmp_path / "out"
        run([*command, "--cache-dir", str(cache), "--overwrite", "--output", str(output)])
        assert results(output)["cache"]["state"] == state
        return results(output)["phases_s"]["warmup"]

    def cold() -> float:
        caches.append(tmp_path / f"cache-{len(caches)}")
        return warm_up(caches[-1], "cold")

    assert_at_most(1 / 3, lambda: warm_up(caches[0], "warm"), cold, ratios)


POOLS = """
import multiprocessing, sys, time
from cecompile import __main__, cli

def pools(*_, **__):
    began = time.perf_counter()
    for _ in range(50):
        with multiprocessing.get_context("fork").Pool(2):
            pass
    print(time.perf_counter() - began)

cli.doctor_command.callback = pools
if sys.argv.pop(1) == "inside":
    sys.argv.append("doctor")
    __main__.main()
pools()
"""


@pytest.mark.process
def test_pools_of_processes_take_no_longer_under_the_command(ratios):
    """Of 50, none hangs: a worker that does not die of its signal is waited for."""

    def seconds(where: str) -> float:
        return float(run([sys.executable, "-c", POOLS, where]).stdout)

    assert_at_most(2.0, lambda: seconds("inside"), lambda: seconds("outside"), ratios)
