"""The contest's door: the official script's sections, lines and output, whatever memory there is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.passes import stock_texts
from support.runs import run_command
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from cecompile import Answerer, demo, read_questions
from cecompile.cli import cli
from cecompile.contest import WARM_UP, run_sections

ROWS = demo.CHAT.read_text().splitlines()[:6]


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(ROWS))
    return path


@pytest.mark.parametrize("engine", ["eager", "reference"])
def test_lines_and_output_are_the_official_scripts(engine, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    how = ("--engine", engine, "--device", "cpu", "--longest", 300, "--max-new-tokens", 30, "--predictions", out)
    printed = run_command("contest", demo.MODEL, rows, *how).splitlines()
    texts = stock_texts(demo.MODEL, read_questions(rows), 30)
    answers = printed.index("===== Answers =====")
    assert printed[answers + 1 : answers + 7] == texts
    assert printed[answers + 7] == "===== Perf result ====="
    assert re.fullmatch(r"Elapsed_time:  \d+\.\d+", printed[answers + 8])
    right = sum(text == json.loads(row)["answer"] for text, row in zip(texts, ROWS, strict=True))
    assert printed[answers + 9 :] == [f"Correctness: {right}/6"]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [[{"generated_text": t}] for t in texts]


def test_the_official_section_3_holds_answers_for_chats_and_an_iterator_for_text():
    """The reason for counting the answers explicitly: the version and the rows decide what the official time covers."""
    pipe = pipeline("text-generation", model=str(demo.MODEL), device="cpu")
    data = [json.loads(row) | {"text": "one two"} for row in ROWS[:2]]
    how = {"max_new_tokens": 2, "do_sample": False}
    assert isinstance(pipe(KeyDataset(data, "message"), **how), list)
    assert not isinstance(pipe(KeyDataset(data, "text"), **how), list)


def test_what_is_wrong_is_said_in_a_line(rows, tmp_path):
    none = tmp_path / "none"
    assert run_command("contest", none, rows, exit_code=2) == f"cecompile: {none}: no such directory\n"
    how = ("--engine", "eager", "--device", "cpu", "--longest", 300, "--max-new-tokens", 3)
    done = run_command("contest", demo.MODEL, rows, *how, "--predictions", none / "out.jsonl", exit_code=2)
    assert done.endswith(f"cecompile: {none / 'out.jsonl'}: cannot be written: No such file or directory\n")


def test_all_shapes_are_warm_before_the_data_is_looked_at(rows):
    answerer = Answerer.from_pretrained(demo.MODEL, device="cpu", engine="eager", new_tokens=30)
    answerer.warm_up([WARM_UP], longest=300)
    warmed = answerer.runtime.warmup.warmed
    assert len(run_sections(answerer, str(rows), longest=300)) == 6
    assert answerer.runtime.warmup.warmed is warmed


RUNS_OUT = """
import re, resource, sys
from cecompile import Answerer
from cecompile.contest import run_sections
answerer = Answerer.from_pretrained(sys.argv[1], device="cpu", engine="eager", tokens_per_bucket=8192, new_tokens=4)
answerer.runtime.load()
taken = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + 700_000_000, resource.RLIM_INFINITY))
run_sections(answerer, sys.argv[2], longest=300)
"""


@pytest.mark.process
def test_a_run_steps_down_where_memory_runs_out(wide_llama, rows):
    command = [sys.executable, "-c", RUNS_OUT, str(wide_llama), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cecompile: buckets made smaller: memory ran out with " in done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "Correctness: 0/6"
    how = ("--device", "cpu", "--engine", "eager", "--longest", 300, "--max-new-tokens", 4)
    plenty = CliRunner().invoke(cli, ["contest", str(wide_llama), str(rows), *map(str, how)])
    assert plenty.stdout.splitlines()[:-2] == lines[:-2]
