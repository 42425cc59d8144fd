"""Windows: what a run in windows says is what one in a single piece says, in memory that does not grow with it."""

import json
import tracemalloc

import numpy as np
import pytest
from support.rows import CHATS, ROWS, write_rows, write_table
from support.runs import Runs, run_command, samples

from cecompile import Scorer, evaluate, read_questions
from cecompile.errors import UserError
from cecompile.results.check import problems
from cecompile.results.compare import compare_directories
from cecompile.results.journal import NAME
from cecompile.run.weights import Weights
from cecompile.run.windows import plan_in_windows
from cecompile.tasks import windows as windows_module
from cecompile.tasks.question import digest
from cecompile.tasks.read import read_windows
from cecompile.tasks.windows import Windows, split

EAGER = ["--engine", "eager", "--tokens-per-bucket", "256"]
HOW = {
    "trees": (ROWS, EAGER),
    "chats": (CHATS, [*EAGER, "--max-new-tokens", "4"]),
    "reference": (ROWS[:6], ["--engine", "reference"]),
    "chats, reference": (CHATS[:4], ["--engine", "reference", "--max-new-tokens", "4"]),
}
SIZE = {"trees": 7, "chats": 5, "reference": 4, "chats, reference": 3}


@pytest.fixture(scope="module")
def runs(babbler, tmp_path_factory):
    """Per kind of run its `Runs`, with the results of one in a single piece in "whole" and in windows in "windows"."""
    made: dict[str, Runs] = {}

    def get(kind: str) -> Runs:
        if kind not in made:
            rows, how = HOW[kind]
            made[kind] = run = Runs(tmp_path_factory.mktemp("windows"), babbler, rows, *how)
            for name, more in (("whole", []), ("windows", ["--window", SIZE[kind]])):
                done = run(name, *more)
                assert done.exit_code == 0, done.output
        return made[kind]

    return get


def samples_of(run: Runs, name: str) -> list[dict]:
    return samples(run.directory / name)


@pytest.mark.parametrize("kind", HOW)
def test_a_run_in_windows_says_the_same(kind, runs):
    run = runs(kind)
    whole, windows = run.results("whole"), run.results("windows")
    assert problems(run.directory / "windows") == []
    assert windows.keys() == whole.keys()
    same = ("questions", "choices", "metrics", "data", "truncated_questions", "answers", "model", "resumed")
    assert all(windows.get(key) == whole.get(key) for key in same if key != "answers" or "reference" in kind)
    if kind != "trees":
        texts = [[one.get("text") for one in samples_of(run, name)] for name in ("whole", "windows")]
        assert texts[0] == texts[1]
    if "reference" in kind:
        assert run.samples("windows") == run.samples("whole")
    else:
        number = -(-len(HOW[kind][0]) // SIZE[kind])
        assert windows["plan"]["windows"] == number
        assert "windows" not in whole["plan"]
        assert windows["plan"]["unshared_tokens"] == whole["plan"]["unshared_tokens"]
        assert windows["plan"]["prefix_tree_tokens"] > whole["plan"]["prefix_tree_tokens"]
        assert {phase for phase, *_ in windows["timeline"]} == set(windows["phases_s"])
    if kind == "trees":
        before, now = samples_of(run, "whole"), samples_of(run, "windows")
        for a, b in zip(before, now, strict=True):
            values = [np.array(one.pop("loglikelihoods")) for one in (a, b)]
            assert np.abs(values[0] - values[1]).max() < 1e-4
        assert before == now


def test_all_in_one_window_is_as_before(runs):
    run = runs("trees")
    assert run("one window", "--window", len(ROWS)).exit_code == 0
    assert run.samples("one window") == run.samples("whole")
    assert run.results("one window")["plan"] == run.results("whole")["plan"]


@pytest.mark.parametrize(("kind", "records"), [("trees", 1), ("trees", 4), ("chats", 6)])
def test_an_interrupted_run_in_windows_goes_on(kind, records, runs):
    run, name, window = runs(kind), f"stopped {records}", ["--window", SIZE[kind]]
    assert run.stopped(name, records, *window).exit_code == 130
    assert [p.name for p in (run.directory / name).iterdir()] == [NAME]
    refused = run(name, "--resume", "--window", SIZE[kind] + 1)
    assert refused.exit_code == 2
    assert f"window is {SIZE[kind] + 1}, was {SIZE[kind]}" in refused.output
    assert run.stopped(name, 1, *window, "--resume").exit_code == 130
    again = run(name, *window, "--resume")
    assert again.exit_code == 0, again.output
    resumed = run.results(name)["resumed"]
    assert sum(n for kind, n in resumed.items() if kind != "from") == records + 1
    assert run.samples(name) == run.samples("windows")
    files = [{p.name for p in (run.directory / one).iterdir()} for one in (name, "windows")]
    assert files[0] == files[1]


def test_a_later_window_that_is_planned_otherwise_is_not_gone_on_with(runs, monkeypatch):
    run = runs("trees")
    assert run.stopped("otherwise", 6, "--window", 7).exit_code == 130
    monkeypatch.setattr("cecompile.workload.plan.MIN_SHARED", 1000)  # as another version might pack them
    monkeypatch.setattr("cecompile.run.resume._plan_facts", lambda plan: {"plan": str(plan.useful_tokens)})
    monkeypatch.setattr("cecompile.results.journal.Journal.expect", lambda *_: None)  # the first window's pass
    refused = run("otherwise", "--window", 7, "--resume")
    assert refused.exit_code == 2
    assert "cannot be resumed: window 2 is planned otherwise" in refused.output


def test_a_bad_row_in_the_last_window_is_refused_before_anything_is_loaded(babbler, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"query": "no choices", "choices": ["one"], "gold": 0}])
    monkeypatch.setattr(Weights, "load", lambda *_: pytest.fail("loaded"))
    arguments = ["--model", str(babbler), "--data", str(data), "--window", "7", "--output", str(tmp_path / "out")]
    refused = run_command("eval", *arguments, exit_code=2)
    assert refused == f"cecompile: {data}: line 41: field 'choices': 1 choices, at least 2 are needed\n"
    assert not (tmp_path / "out").exists()


def test_a_longer_sequence_in_a_later_window_is_warmed_up_for(babbler, tmp_path):
    rows = [*ROWS[:14], {"query": "and so on " * 110, "choices": ["no", "yes", "or"], "gold": 1}, *ROWS[15:25]]
    run = Runs(tmp_path, babbler, rows, *EAGER)
    assert run("whole").exit_code == 0
    done = run("windows", "--window", 7)
    assert done.exit_code == 0, done.output
    results = run.results("windows")
    assert problems(tmp_path / "windows") == []
    assert {256, 512} <= {bucket["length"] for bucket in results["plan"]["buckets"]}
    assert len(results["warmed"]) == len(results["plan"]["buckets"])
    assert results["metrics"] == run.results("whole")["metrics"]


def test_questions_in_memory_are_run_in_windows_too(babbler, tmp_path, runs):
    questions = read_questions(write_rows(tmp_path / "rows.jsonl"))
    scorer = Scorer.from_pretrained(babbler, device="cpu", engine="eager", tokens_per_bucket=256)
    done = evaluate(scorer, questions, window=7, repeat=2)
    assert done.results["metrics"] == runs("trees").results("windows")["metrics"]
    assert done.results["inference_s"]["runs"] == 2
    assert [one.id for one in done.samples] == [q.id for q in questions]
    expected = [one["loglikelihoods"] for one in samples_of(runs("trees"), "windows")]
    assert [list(one.loglikelihoods) for one in done.samples] == expected
    assert evaluate(scorer, questions).results["plan"].keys() == runs("trees").results("whole")["plan"].keys()


def test_a_baseline_and_a_comparison(runs):
    run = runs("trees")
    done = run("compared", "--window", 7, "--baseline", run.directory / "whole")
    assert done.exit_code == 0, done.output
    assert run.results("compared")["comparison"]["differing"] == 0
    assert compare_directories(run.directory / "whole", run.directory / "windows")["failed"] == []


@pytest.mark.parametrize("options", [[], ["--profile", "h100"]])
def test_a_plan_in_windows(options, runs):
    run = runs("trees")
    how = ["--model", run.arguments[1], "--data", run.data, "--tokens-per-bucket", "256", "--json", *options]
    plans = [json.loads(run_command("plan", *how, "--window", n)) for n in (7, 40)]
    assert plans[0]["windows"] == 6
    assert plans[0]["unshared_tokens"] == plans[1]["unshared_tokens"]
    assert plans[0]["slots"] == sum(b["rows"] * b["length"] * b["runs"] for b in plans[0]["buckets"])
    assert plans[0]["useful_tokens"] == sum(b["useful_tokens"] for b in plans[0]["buckets"])
    assert plans[0].keys() - {"windows"} == plans[1].keys()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_windows_of_a_file_are_its_questions(kind, tmp_path):
    path = write_table(tmp_path / f"rows.{kind}")
    questions = read_questions(path)
    large = read_windows(path, "auto", None, 7)
    assert isinstance(large.questions, Windows)
    for _ in range(2):
        assert [len(window) for window in large.questions] == [7, 7, 7, 7, 7, 5]
        assert [q for window in large.questions for q in window] == questions
    assert (len(large.questions), large.questions.number, large.task) == (40, 6, "choices")
    assert large.questions.digest == digest(questions)


@pytest.mark.parametrize(("limit", "count"), [(20, 20), (0.5, 20), (0.51, 21), (0.2, 8), (0.1, 4), (7, 7)])
def test_a_limit_counts_over_windows(limit, count, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    read = read_windows(path, "auto", limit, 7)
    expected = read_questions(path, limit=limit)
    assert len(expected) == count
    if count <= 7:
        assert isinstance(read.questions, list)
        assert read.questions == expected
    else:
        assert isinstance(read.questions, Windows)
        assert [q for window in read.questions for q in window] == expected
        assert read.questions.digest == digest(expected)


def test_a_file_that_changes_between_the_readings_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    large = read_windows(path, "auto", None, 7)
    assert isinstance(large.questions, Windows)
    write_rows(path, [*ROWS, ROWS[0]])
    with pytest.raises(UserError, match="changed while it was read"):
        list(large.questions)


def test_long_questions_end_a_window_sooner(tmp_path, monkeypatch):
    questions = read_questions(write_rows(tmp_path / "rows.jsonl"))
    monkeypatch.setattr(windows_module, "CHARACTERS", 3 * questions[0].characters)
    windows = list(split(questions, 7))
    assert max(len(window) for window in windows) == 3
    assert [q for window in windows for q in window] == questions


def test_planning_takes_no_more_memory_for_three_times_the_rows(babbler, tmp_path):
    scorer = Scorer.from_pretrained(babbler)
    peaks = []
    for count in (8_000, 24_000):
        rows = ({"query": f"Number {i}", "choices": ["a", "an"], "gold": i % 2} for i in range(count))
        path = write_rows(tmp_path / f"{count}.jsonl", rows)
        tracemalloc.start()
        totals, sequences = plan_in_windows(scorer, read_windows(path, "auto", None, 2000).questions, fit=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sequences == 2 * count
        assert totals.slots >= totals.useful_tokens
    assert peaks[1] < 1.1 * peaks[0], peaks
