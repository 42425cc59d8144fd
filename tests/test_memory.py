"""The memory budget: predicted before loading, kept to, refused where nothing fits, stepped down where it runs out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.checkpoints import save_demo_llama
from support.rows import ROWS, write_rows
from support.runs import results as results_of

from cecompile import Question, Scorer
from cecompile.cli import cli
from cecompile.device import is_out_of_memory, parse_size
from cecompile.planning.memory import USABLE, Budget
from cecompile.run import engine_builder


def evaluate(model: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cecompile", "eval", "--model", str(model), "--device", "cpu", "--limit", "60"]
    return subprocess.run([*command, "--output", str(out), *more], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [("30GB", 30 * 10**9), ("28GiB", 28 * 2**30), ("512M", 512 * 10**6), ("1.5 GB", 1500 * 10**6), ("4096", 4096)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "30 GBs", "1e9", "30XB"])
def test_not_sizes(text):
    with pytest.raises(ValueError, match=r"^"):
        parse_size(text)


@pytest.mark.process
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_every_limit_is_kept_or_refused_before_loading(wide_llama, held, tmp_path, engine):
    """From plenty down to too little for anything."""
    sizes, refusals = set(), 0
    steps = (1500, 350, 200, 0, -400) if engine == "eager" else (400,)
    rows = "60" if engine == "eager" else "20"  # the latter fill one shape to compile
    for megabytes in (held + room for room in steps):
        out = tmp_path / str(megabytes)
        done = evaluate(wide_llama, out, "--memory-limit", f"{megabytes}MB", "--engine", engine, "--limit", rows)
        if done.returncode == 2:
            assert done.stderr.count("\n") == 1
            assert "GB are there on cpu" in done.stderr
            assert not out.exists()
            refusals += 1
            continue
        assert done.returncode == 0, done.stderr
        results = results_of(out)
        memory = results["memory"]
        assert memory["limit_bytes"] == megabytes * 10**6
        assert memory["peak_bytes"] <= memory["limit_bytes"]
        assert memory["predicted_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.1)
        sizes.add(results["plan"]["buckets"][0]["rows"] * results["plan"]["buckets"][0]["length"])
    if engine == "eager":
        assert refusals >= 2
        assert len(sizes) >= 2  # smaller buckets where less is there


@pytest.mark.process
def test_a_size_that_was_asked_for_and_does_not_fit_is_refused_with_one_that_does(wide_llama, held, tmp_path):
    how = ("--memory-limit", f"{held + 500}MB", "--engine", "eager", "--tokens-per-bucket")
    done = evaluate(wide_llama, tmp_path / "out", *how, "8192")
    assert done.returncode == 2
    fits = done.stderr.rsplit("--tokens-per-bucket ", 1)[1].split()[0]
    assert evaluate(wide_llama, tmp_path / "out", *how, fits).returncode == 0


RUNS_OUT = """
import re, resource, sys
from cecompile import Scorer, demo, read_questions
questions = read_questions(str(demo.HELLASWAG), limit=200)
scorer = Scorer.from_pretrained(sys.argv[1], device="cpu", engine="eager", tokens_per_bucket=8192)
scorer.runtime.load()
taken = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + 700_000_000, resource.RLIM_INFINITY))
scores = scorer.score(questions)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
plenty = Scorer.from_pretrained(sys.argv[1], device="cpu", engine="eager").score(questions[:40])
print(max(abs(a - b) for x, y in zip(scores.loglikelihoods, plenty.loglikelihoods) for a, b in zip(x, y)))
print(scorer.runtime.mode.note)
print(scores.workload.plan.buckets[0].slots)
"""


@pytest.mark.process
def test_buckets_get_smaller_when_memory_runs_out_all_the_same(wide_llama):
    """The prediction is right, but something else has taken the memory meanwhile. What is left holds a pass of half the
    size once, but not always again."""
    command = [sys.executable, "-c", RUNS_OUT, str(wide_llama)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    difference, note, slots = done.stdout.splitlines()[-3:]
    assert float(difference) < 1e-3
    assert note.startswith("buckets made smaller: memory ran out with ")
    assert int(slots) < 8192


HOLDS_ONCE = """
import json, sys
from cecompile import Scorer, device, procfs, read_questions
from cecompile.cli import cli
model, data, folder, most = sys.argv[1:]
how = ["--model", model, "--data", data, "--device", "cpu", "--engine", "compiled", "--cache-dir", folder + "/cache"]
Scorer.from_pretrained(model, device="cpu")
began = procfs.read_status()["VmRSS"]
procfs.memory_left = lambda: max(0, began + int(most) - procfs.read_status()["VmRSS"])
cli(["warm", *how], standalone_mode=False)
cli(["eval", *how, "--output", folder + "/out"], standalone_mode=False)
scorer, questions = Scorer.from_pretrained(model, device="cpu", cache_dir=folder + "/cache"), read_questions(data)
first, second = scorer.score(questions), scorer.score(questions)
assert first.loglikelihoods == second.loglikelihoods
print(scorer.runtime.mode.note, procfs.read_status()["VmHWM"] - began)
"""


@pytest.mark.process
def test_a_host_that_holds_weights_and_plan_once_is_enough_for_every_call(tmp_path):
    """What is loaded already does not count twice: not by `warm`, nor by `eval` after, nor by later calls."""
    sizes = {"hidden_size": 1024, "intermediate_size": 16384, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = save_demo_llama(tmp_path / "model", **sizes, max_position_embeddings=512)
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    arguments = ["plan", "--model", str(model), "--data", str(data), "--device", "cpu", "--json"]
    needed = json.loads(CliRunner().invoke(cli, arguments).stdout)["memory"]
    most = int(needed["total"] / USABLE["cpu"] + 0.5 * needed["weights"])
    command = [sys.executable, "-c", HOLDS_ONCE, str(model), str(data), str(tmp_path), str(most)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    note, peak = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert note == "None"
    assert needed["weights"] < int(peak) <= most


def test_without_memory_for_the_stock_model_beside_it_a_run_goes_on_unchecked(tiny_llama, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_builder, "disagreement", out_of_memory)
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager")
    scores = scorer.score([Question("0", "The question is", ("easy", "not so easy"), 0)])
    assert len(scores.loglikelihoods[0]) == 2
    assert scorer.runtime.mode.note.startswith("not verified against the stock model")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp"), True),
        (RuntimeError("NvMapMemAllocInternalTagged: 1075072515 error 12"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
        (OSError("NvMap"), False),
    ],
)
def test_forms_of_running_out_of_memory(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_what_takes_turns_is_counted_once():
    parts = {"weights": 100, "activations": 30, "mask": 2, "head": 3, "cache": 50, "fixed": 7, "loading": 5}
    assert Budget(**parts, in_turns=False).summary() == parts | {"total": 192}
    assert Budget(**parts, in_turns=True).summary() == parts | {"total": 157}
