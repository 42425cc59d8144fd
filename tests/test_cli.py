"""The command line: what it writes, what it prints, how fast it answers."""

import ast
import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.checkpoints import add_tokenizer, copy_without_weights, save_tiny_llama
from support.models import tiny_model
from support.rows import ROWS as ROWS_
from support.rows import shared_file, write_rows
from support.runs import results, run_process, samples
from support.runs import run_command as run
from transformers import AutoModelForCausalLM

import cecompile
from cecompile import demo, imports
from cecompile.model.checkpoint import read_checkpoint
from cecompile.results.clock import CLOCKS, PHASES, Clock, latencies, process_start

ROWS = ROWS_[:6]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def scoring(tiny_llama, data) -> list[str]:
    """`eval` of the tiny model, all but the engine and where to write."""
    return ["eval", "--model", str(tiny_llama), "--data", str(data), "--device", "cpu", "--engine", "compiled"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scoring) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, run(*scoring, "--engine", "eager", "--clock", "section3", "--output", output)


def test_result_file_has_what_the_schema_says(finished):
    r = results(finished[0])
    assert (r["schema"], r["task"], r["questions"], r["choices"]) == (1, "choices", 6, 18)
    assert set(r["metrics"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert set(r["latency_s"]) == set(CLOCKS)
    assert set(r["phases_s"]) == set(PHASES)
    assert r["headline"] == {"clock": "section3", "seconds": r["latency_s"]["section3"]}
    assert {"useful_tokens", "slots", "unshared_tokens", "prefix_tree_tokens", "buckets"} <= set(r["plan"])
    assert all(set(b) == {"rows", "length", "readouts", "runs", "useful_tokens"} for b in r["plan"]["buckets"])
    assert sum(b["useful_tokens"] for b in r["plan"]["buckets"]) == r["plan"]["useful_tokens"]
    assert (r["model"]["architecture"], r["model"]["dtype"]) == ("LlamaForCausalLM", "float32")
    assert len(r["model"]["fingerprint"]) == len(r["data"]["digest"]) == 64
    assert r["memory"]["peak_bytes"] > 0
    assert r["environment"]["versions"]["torch"]


def test_samples_are_in_input_order(finished):
    lines = samples(finished[0])
    assert [s["id"] for s in lines] == [str(i) for i in range(6)]
    assert [s["label"] for s in lines] == [r["gold"] for r in ROWS]
    for s in lines:
        assert list(s) == ["id", "label", "prediction", "prediction_norm", "loglikelihoods", "greedy"]
        assert s["prediction"] == s["loglikelihoods"].index(max(s["loglikelihoods"]))


def test_table_shows_score_and_all_latencies(finished):
    for word in ("acc", "acc_norm", "latency strict", "latency section3", "latency inference", "headline", *PHASES):
        assert word in finished[1]


def test_only_the_results_are_left(finished):
    assert sorted(p.name for p in finished[0].iterdir()) == ["results.json", "samples.jsonl"]


def test_overwrite(scoring, tmp_path):
    how = (*scoring, "--engine", "reference", "--output", tmp_path / "out")
    run(*how, "--limit", 2)
    run(*how, "--limit", 1, "--overwrite")
    assert (results(tmp_path / "out")["questions"], results(tmp_path / "out")["plan"]) == (1, None)


def test_unlabelled_data_gives_predictions_and_no_metrics(scoring, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "choices": ["a", "b"]}] * 2)
    assert "no labels" in run(*scoring, "--data", data, "--engine", "eager", "--output", tmp_path / "out")
    assert set(results(tmp_path / "out")["metrics"].values()) == {None}
    assert samples(tmp_path / "out")[0]["label"] is None


def test_the_fingerprint_is_of_the_weights_however_they_are_stored(tiny_llama, tmp_path):
    again = save_tiny_llama(tmp_path / "again", 1024)
    other = save_tiny_llama(tmp_path / "other", 1024, initializer_range=0.31)
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    prints = [read_checkpoint(str(directory)).fingerprint for directory in (tiny_llama, again, sharded, other)]
    assert prints[0] == prints[1] == prints[2] != prints[3]


@pytest.mark.process
def test_plan_loads_no_weights(tiny_llama, data, tmp_path):
    model = copy_without_weights(tiny_llama, tmp_path / "model")
    how = ("plan", "--model", model, "--data", data, "--device", "cpu")
    plan = json.loads(run(*how, "--json"))
    assert plan["prefix_tree_tokens"] <= plan["useful_tokens"] <= plan["unshared_tokens"]
    assert sum(b["rows"] * b["length"] * b["runs"] for b in plan["buckets"]) == plan["slots"]
    assert "useful tokens" in run(*how)


@pytest.mark.process
def test_plan_of_all_of_hellaswag(llama_tokenizer_dir):
    data = shared_file("hellaswag_val.jsonl")
    how = ("--device", "cpu", "--tokens-per-bucket", 8192, "--model", llama_tokenizer_dir)
    plan = json.loads(run_process("plan", "--json", *how, "--data", data).stdout)
    assert plan["useful_tokens"] <= 1.03 * plan["prefix_tree_tokens"]
    assert plan["slots"] <= 1.03 * plan["useful_tokens"]
    assert len(plan["buckets"]) <= 4


@pytest.mark.process
def test_machine_without_a_compiler_runs_uncompiled_and_says_so(scoring, tmp_path):
    variables = {"PATH": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_process(*scoring, "--output", tmp_path / "out", **variables)
    engine = results(tmp_path / "out")["engine"]
    assert engine["name"] == "eager"
    assert engine["note"].startswith("ran uncompiled")
    assert "ran uncompiled" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["eval", "--help"], 0), (["eval", "--engine", "what"], 2), (["what"], 2)],
)
def test_help_and_usage_errors_import_nothing_heavy(arguments, status):
    """Python writes every import to standard error; how long an answer takes is asserted in tests/benchmarks."""
    command = [sys.executable, "-X", "importtime", "-m", "cecompile", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"cecompile.cli", "click"} <= imported
    heavy = {"torch", "transformers", "datasets", "tokenizers", "huggingface_hub", "pyarrow", "pandas", "rich"}
    assert heavy & {name.split(".")[0] for name in imported} == set()


CLOCKED = """
import json, runpy, sys, time
from cecompile.results import clock

to, seen = sys.argv.pop(1), {}

def between_moments(name, call):
    def called(*arguments):
        before = time.perf_counter()
        found = call(*arguments)
        seen[name] = before, time.perf_counter()
        with open(to, "w") as file:
            json.dump(seen, file)
        return found
    return called

clock.process_start = between_moments("start", clock.process_start)
clock.Clock.phases = between_moments("read", clock.Clock.phases)
runpy.run_module("cecompile", run_name="__main__")
"""


@pytest.mark.process
def test_phases_sum_to_the_time_since_the_process_began(scoring, tmp_path):
    """The sum lies between moments taken around the start of the process and around the last reading of its clock.

    The system counts a process's age in ticks, up to one too many, and while it is asked some time passes.
    """
    moments, output = tmp_path / "moments", tmp_path / "out"
    command = [sys.executable, "-c", CLOCKED, str(moments), *scoring, "--engine", "eager", "--output", str(output)]
    before = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    after = time.perf_counter()
    said, _ = process.communicate()
    assert process.returncode == 0, said
    seen = json.loads(moments.read_text())
    unknown = 1 / os.sysconf("SC_CLK_TCK") + seen["start"][1] - seen["start"][0]
    total, rounding = sum(results(output)["phases_s"].values()), 1e-6
    assert seen["read"][0] - after - rounding <= total <= seen["read"][1] - before + unknown + rounding


def test_clock_books_every_moment_once(monkeypatch):
    """With a source of time that says which moment it is: 0, 1, 3, 6, 10, ..."""
    moments = itertools.accumulate(itertools.count())
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: float(next(moments)))
        clock = Clock()
        for phase in ("preprocess", "load_model", "preprocess", "inference"):
            clock.enter(phase)
        phases = clock.phases()
    assert phases == {"load_model": 1 + 3, "preprocess": 2 + 4, "inference": 5, "warmup": 0, "score": 0}
    booked = [("load_model", 0, 1), ("preprocess", 1, 3), ("load_model", 3, 6), ("preprocess", 6, 10)]
    assert clock.timeline() == [*booked, ("inference", 10, 15)]


def test_a_real_clock_books_all_that_passes():
    before = time.perf_counter()
    clock = Clock()
    after = time.perf_counter()
    for phase in ("preprocess", "load_model", "preprocess", "inference"):
        clock.enter(phase)
    last = time.perf_counter()
    phases = clock.phases()
    total, rounding = sum(phases.values()), 1e-9
    assert last - after - rounding <= total <= time.perf_counter() - before + rounding
    assert all(seconds >= 0 for seconds in phases.values())
    assert process_start() < before


def test_latencies():
    phases = {"load_model": 1, "preprocess": 2, "warmup": 4, "inference": 8, "score": 16}
    assert latencies(phases, [8]) == {"strict": 29, "section3": 10, "inference": 8}
    assert latencies(phases, [1, 2, 5]) == {"strict": 23, "section3": 4, "inference": 2}  # as if run once


def test_a_choice_that_the_head_rules_out_has_minus_infinity(data, tmp_path):
    """As every engine finds, and results of two runs agree about it."""
    model = tiny_model("phi", vocab_size=1024, max_position_embeddings=512)
    model.lm_head.bias[3::5] = -math.inf
    model.save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    for engine in ("eager", "reference"):
        run("eval", "--model", tmp_path / "model", "--data", data, "--engine", engine, "--output", tmp_path / engine)
    one, other = ([s["loglikelihoods"] for s in samples(tmp_path / engine)] for engine in ("eager", "reference"))
    assert any(value == -math.inf for values in one for value in values)
    assert any(value > -math.inf for values in one for value in values)
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    compared = json.loads(run("compare", tmp_path / "reference", tmp_path / "eager", "--json"))
    assert compared["largest_difference"] < 1e-3


def test_repeated_inference_counts_its_median(tiny_llama, tmp_path):
    run("eval", "--model", tiny_llama, "--limit", 20, "--engine", "eager", "--repeat", 3, "--output", tmp_path / "out")
    r = results(tmp_path / "out")
    assert r["inference_s"]["runs"] == 3
    assert r["inference_s"]["min"] <= r["inference_s"]["median"] <= r["inference_s"]["max"]
    assert r["latency_s"]["inference"] == r["inference_s"]["median"]
    assert r["phases_s"]["inference"] >= r["inference_s"]["median"] + r["inference_s"]["min"]


def test_embedded_demo_scores_well(tmp_path):
    run("eval", "--device", "cpu", "--engine", "eager", "--output", tmp_path / "out")
    r = results(tmp_path / "out")
    assert r["questions"] >= 200
    assert r["metrics"]["acc"] >= 0.85
    size = sum(f.stat().st_size for f in Path(demo.__file__).parent.rglob("*") if f.is_file())
    assert size < 4 * 2**20


@pytest.mark.process
def test_public_names_survive_the_import_of_every_module():
    """A module must not be named as a function of the package is: importing it would hide the function."""
    code = (
        "import importlib, pkgutil, cecompile\n"
        "for m in pkgutil.walk_packages(cecompile.__path__, 'cecompile.'):\n"
        "    if m.name != 'cecompile.__main__': importlib.import_module(m.name)\n"
        "print(cecompile.__all__ == [name for name in cecompile.__all__ if callable(getattr(cecompile, name))])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_no_package_seems_absent_once_transformers_has_been_imported(monkeypatch):
    """By then `transformers` may have found a package that it imports later."""
    hidden: list[str] = []
    monkeypatch.setattr(imports, "without", lambda packages: hidden.extend(packages) or contextlib.nullcontext())
    imports.import_transformers()
    assert hidden == []


def test_assertions_only_tell_types():
    """Python leaves them out where PYTHONOPTIMIZE is set, so nothing else may hang on one."""
    for path in Path(cecompile.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                assert node.msg is None, path
                assert re.fullmatch(r"[\w.]+ is not None|isinstance\([\w.]+, \w+\)", ast.unparse(node.test)), path


@pytest.mark.process
@pytest.mark.parametrize("engine", ["eager", "reference"])
def test_without_assertions_the_same(engine, scoring, tmp_path):
    for name in ("", "1"):
        run_process(*scoring, "--engine", engine, "--output", tmp_path / f"out{name}", PYTHONOPTIMIZE=name)
    assert (tmp_path / "out1" / "samples.jsonl").read_bytes() == (tmp_path / "out" / "samples.jsonl").read_bytes()


@pytest.mark.process
@pytest.mark.compiles
def test_python_without_asserts_compiles_all_the_same(scoring, tiny_llama, data, tmp_path):
    """The command starts Python anew; the Python API runs uncompiled and says why."""
    run(*scoring, "--output", tmp_path / "with")
    run_process(*scoring, "--output", tmp_path / "without", PYTHONOPTIMIZE="1")
    assert results(tmp_path / "without")["engine"] == results(tmp_path / "with")["engine"]
    assert results(tmp_path / "with")["engine"]["name"] == "compiled"
    assert samples(tmp_path / "without") == samples(tmp_path / "with")
    api = (
        "import sys, cecompile as c; s = c.Scorer.from_pretrained(sys.argv[1], device='cpu')\n"
        "s.score(c.read_questions(sys.argv[2])); print(s.runtime.mode.engine, s.runtime.mode.note)"
    )
    command = [sys.executable, "-O", "-c", api, str(tiny_llama), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "eager ran uncompiled: torch's compiler needs Python's assert statements; unset PYTHONOPTIMIZE, leave out -O\n"
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("-O -m cecompile eval", "-m cecompile eval"),
        ("-OO -m cecompile eval -O", "-m cecompile eval -O"),
        ("-BOO -m cecompile", "-B -m cecompile"),
        ("-bOOm cecompile -OO", "-bm cecompile -OO"),
        ("-OOW O -X O -WOO -m cecompile", "-W O -X O -WOO -m cecompile"),
        ("-OO /usr/bin/cecompile --data -O", "/usr/bin/cecompile --data -O"),
        ("-OO", ""),
        ("-I -m cecompile", "-I -m cecompile"),
        ("-OOc import,cecompile -OO", "-c import,cecompile -OO"),
    ],
)
def test_python_is_started_anew_without_optimization(given, kept):
    from cecompile.__main__ import without_optimization

    assert without_optimization(given.split()) == kept.split()


@pytest.mark.process
def test_python_without_docstrings(tiny_llama):
    """The command works however the option is written; the API works, or says in one line what to leave out."""
    plan = ["plan", "--model", str(tiny_llama), "--limit", "3", "--device", "cpu"]
    command = [sys.executable, "-BOOm", "cecompile", *plan]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "useful tokens" in done.stdout
    api = (
        "import sys, cecompile\nfrom cecompile.errors import UserError\n"
        "try: cecompile.Scorer.from_pretrained(sys.argv[1], device='cpu', engine='eager')\n"
        "except UserError as error: print(error)"
    )
    command = [sys.executable, "-OO", "-c", api, str(tiny_llama)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = "LlamaConfig: transformers needs Python's docstrings; leave out -OO and PYTHONOPTIMIZE=2, -O is possible"
    assert [said for said in done.stdout.splitlines() if "[ERROR]" not in said] in ([], [line])  # transformers' own


@pytest.mark.process
@pytest.mark.parametrize("variables", [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONWARNINGS": "error"},
    {"PYTHONOPTIMIZE": "2"},
])  # fmt: skip
def test_an_odd_environment_is_one_line_at_most(variables, tiny_llama):
    command = [sys.executable, "-m", "cecompile", "plan", "--model", str(tiny_llama), "--limit", "3", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    assert (done.returncode, done.stderr) == (0, "") or (
        done.returncode == 2
        and re.fullmatch(r"cecompile: Python (takes files for|turns warnings into) .*\n", done.stderr)
    )
