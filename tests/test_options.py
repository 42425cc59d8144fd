"""Options at their ends: each number is taken as it is written, or refused in one line."""

import json
import os
import re

import pytest
import torch
from click.testing import CliRunner
from support.rows import ROWS, write_rows
from support.runs import run_command

from cecompile import read_questions
from cecompile.cli import cli
from cecompile.device import parse_size
from cecompile.errors import UserError
from cecompile.planning.options import RunOptions
from cecompile.ranks import Ranks
from cecompile.run.language_model import resolve_device
from cecompile.tasks.read import read_windows

DIGITS = "9" * 5000
NOT_COUNTS = ["0", "-1", "-" + DIGITS, DIGITS, "1" + 30 * "0", "1.5", "1e3", "nan", "inf", "", " ", "x", "\u00b2"]
REFUSED = {
    "--repeat": NOT_COUNTS,
    "--window": NOT_COUNTS,
    "--max-new-tokens": NOT_COUNTS,
    "--pipeline": NOT_COUNTS,
    "--tokens-per-bucket": [*NOT_COUNTS, "127", "1048577", "Auto"],
    "--limit": ["0", "-1", "-0.5", "1.5", "nan", "inf", "-inf", "1e400", "", "x", "0x10", DIGITS],
    "--memory-limit": ["0", "0GB", "0.4", "-1GB", "nan", "inf", "1e9", "", "GB", DIGITS, DIGITS + "TB", "9999999TB"],
    "--max-drop": ["nan", "-nan", "inf", "-inf", "-0.1", "100.1", "1e400", "", "x", DIGITS],
}


@pytest.mark.parametrize("option", REFUSED)
def test_numbers_that_make_no_sense_are_refused(option):
    for value in REFUSED[option]:
        done = CliRunner().invoke(cli, ["eval", option, value])
        assert isinstance(done.exception, SystemExit), (value[:40], done.exception)
        assert done.exit_code == 2, value[:40]
        assert "Traceback" not in done.output


def test_the_longest_sequence_to_warm_for_is_a_count():
    for value in NOT_COUNTS:
        assert "Traceback" not in run_command("warm", "--max-depth", value, exit_code=2)


def test_thresholds_of_a_comparison_are_numbers(tmp_path):
    for value in REFUSED["--max-drop"]:
        assert "Traceback" not in run_command("compare", "a", "b", "--max-drop", value, exit_code=2)


ALL, ONE = ["1e300", "9" * 20, "9" * 300, "40.0", "1e2"], ["1", "1.0", "+1", "\u0661", "0_1", "1e-320", "0.01"]


@pytest.mark.parametrize(("values", "count"), [(ALL, 40), (ONE, 1)])
def test_any_limit_that_makes_sense_is_a_number_of_rows(values, count, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    for value in map(float, values):
        assert len(read_questions(path, limit=value)) == count
        assert len(read_windows(path, "auto", value, 7).questions) == count
    assert len(read_questions(path, limit=10**400)) == 40


def test_a_plan_of_all_rows_whatever_the_limit(tiny_llama, tmp_path):
    how = ["--model", tiny_llama, "--data", write_rows(tmp_path / "rows.jsonl", ROWS), "--device", "cpu", "--json"]
    plans = [
        json.loads(run_command("plan", *how, *options))
        for options in ([], ["--limit", "1e300"], ["--limit", "9" * 20, "--window", 1 << 30])
    ]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("limit", [0, -1, -0.5, 1.5, float("nan"), float("inf"), float("-inf")])
def test_limits_of_the_api(limit, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=f"limit {limit}: neither a count"):
        read_questions(path, limit=limit)


@pytest.mark.parametrize("option", ["tokens_per_bucket", "memory_limit", "pipeline"])
@pytest.mark.parametrize("value", [0, -1, 10**30, 1.5, float("nan"), float("inf"), "128", True])
def test_numbers_of_the_api(option, value):
    with pytest.raises(UserError, match=option.replace("_", " ")):
        RunOptions(**{option: value})


def test_sizes():
    assert parse_size("1") == 1
    assert parse_size("9223372036854774784") == 9223372036854774784  # the largest below 2**63 in 64 bits
    for text in REFUSED["--memory-limit"]:
        with pytest.raises(ValueError, match=re.escape(text)):
            parse_size(text)


@pytest.mark.parametrize("name", ["cuda:" + "9" * 20, "cuda:" + DIGITS, "cuda:-1", "cuda:", "cuda:1.5", "", "cpu:-1"])
def test_numbers_of_devices(name):
    before = torch.get_default_device()
    with pytest.raises(UserError, match="--device"):
        resolve_device(name)
    assert torch.get_default_device() == before


RANKS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "MASTER_PORT", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["-1", "1.5", "nan", "", "x", "\u00b2", DIGITS, "9" * 20])
def test_numbers_of_the_environment(name, value, monkeypatch):
    for variable, number in (RANKS | {name: value}).items():
        monkeypatch.setenv(variable, number)
    with pytest.raises(UserError, match=f"^{name}: "):
        Ranks.from_environment()
    assert os.environ[name] == value
