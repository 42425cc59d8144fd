"""The journal: what is read back after any damage, and runs that go on where they were interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import save_demo_llama
from support.rows import ROWS, write_rows
from support.runs import HOW, Runs, run_command, whole_run
from support.waiting import HANG, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

from cecompile import Scorer, evaluate, read_questions
from cecompile.errors import UserError
from cecompile.interrupt import command_to_resume
from cecompile.results import journal as journal_module
from cecompile.results.journal import ANSWERS, NAME, PASSES, Journal, read
from cecompile.run.runtime import Runtime

RECORDS = [(PASSES, 0, b"first"), (PASSES, 1, b""), (ANSWERS, 7, bytes(range(256)))]
FACTS = {"model": "m", "plan": [1, 2]}


def written(directory: Path, records=RECORDS, facts=FACTS) -> bytes:
    with Journal(directory) as journal:
        journal.begin(facts)
        for record in records:
            journal.add(*record)
    return (directory / NAME).read_bytes()


def kept(directory: Path, records=RECORDS) -> list:
    with Journal(directory, resume=True) as journal:
        journal.begin(FACTS)
        return [r for r in records if journal.get(*r[:2]) == r[2]]


def test_what_is_added_is_read_back(tmp_path):
    written(tmp_path)
    assert kept(tmp_path) == RECORDS
    with Journal(tmp_path, resume=True) as journal:
        assert (journal.resumed["passes"], journal.resumed["answers"]) == (2, 1)
        journal.begin(FACTS)
        journal.add(PASSES, 2, b"later")
    assert kept(tmp_path, [*RECORDS, (PASSES, 2, b"later")]) == [*RECORDS, (PASSES, 2, b"later")]


def test_a_journal_cut_anywhere_keeps_the_records_before(tmp_path):
    whole = written(tmp_path)
    ends = [end for *_, end in read(whole)]
    for size in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole[:size])
        if size < ends[0]:
            with pytest.raises(UserError, match="damaged"):
                Journal(tmp_path, resume=True)
        else:
            count = sum(end <= size for end in ends[1:])
            assert kept(tmp_path) == RECORDS[:count]
            assert (tmp_path / NAME).exists() == (count > 0)


@settings(max_examples=200)
@given(data=st.data())
def test_damage_is_noticed_wherever_it_is(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("damaged")
    whole = bytearray(written(directory))
    ends = [end for *_, end in read(bytes(whole))]
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    records = list(read(bytes(whole)))
    assert [r[3] for r in records] == [end for end in ends if end <= place]


@given(st.binary(max_size=400))
def test_any_bytes_are_read_without_an_error(content):
    list(read(content))
    list(read(journal_module._MAGIC + content))


def test_records_out_of_their_place_are_not_read(tmp_path):
    whole = written(tmp_path)
    ends = [end for *_, end in read(whole)]
    swapped = whole[: ends[0]] + whole[ends[1] : ends[2]] + whole[ends[0] : ends[1]]
    assert len(list(read(swapped))) == 1
    assert len(list(read(whole + bytes(4096)))) == 4


def test_an_empty_journal_leaves_nothing(tmp_path):
    with Journal(tmp_path / "a" / "b") as journal:
        journal.begin(FACTS)
        assert (tmp_path / "a" / "b" / NAME).exists()
    assert not list(tmp_path.iterdir())


def test_one_process_writes(tmp_path):
    with Journal(tmp_path) as journal:
        journal.begin(FACTS)
        journal.add(*RECORDS[0])
        with pytest.raises(UserError, match="another process"):
            Journal(tmp_path, resume=True)
        with pytest.raises(UserError, match="another process"):
            Journal(tmp_path).begin(FACTS)
    assert kept(tmp_path) == RECORDS[:1]


def test_a_link_in_the_journals_place_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "out" / NAME).symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="cannot be written"):
        Journal(tmp_path / "out").begin(FACTS)
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_what_the_run_depends_on_is_compared(tmp_path):
    written(tmp_path)
    with Journal(tmp_path, resume=True) as journal, pytest.raises(UserError, match="plan is 3, was") as caught:
        journal.begin(FACTS | {"plan": 3})
    assert "model" not in str(caught.value)
    assert kept(tmp_path) == RECORDS


@pytest.mark.parametrize(("seconds", "times"), [(0, 1), (journal_module.SYNC / 4, 100 + 1)])
def test_waiting_for_the_disk_is_bounded(seconds, times, tmp_path, monkeypatch):
    """A record is added every so many seconds by the clock."""
    synced, now = [], [0.0]
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        with Journal(tmp_path) as journal:
            journal.begin(FACTS)
            for i in range(500):
                now[0] += seconds
                journal.add(PASSES, i, b"x" * 100)
    assert len(synced) == times  # the last one as it is closed


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["eval"], "cecompile eval --output out --resume"),
        (["eval", "--overwrite", "--output", "a b"], "cecompile eval --output 'a b' --resume"),
        (["eval", "--output=o", "--resume"], "cecompile eval --output=o --resume"),
        (["eval", "--data", "a'\n\x1b"], r"cecompile eval --data $'a\x27\x0a\x1b' --output out --resume"),
    ],
)
def test_the_command_that_resumes(arguments, command):
    assert command_to_resume(arguments, Path("out")) == command


@pytest.mark.process
def test_the_shell_reads_the_command_back():
    argument = "a'b\\c\n\u202e漢\x1b"
    command = command_to_resume(["--data", argument], Path("out")).replace("cecompile", "printf '%s|'", 1)
    shown = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout.decode()
    assert shown.split("|")[1] == argument


# ---- runs


@pytest.fixture(scope="module")
def uninterrupted(babbler, tmp_path_factory):
    """Per kind of run its `Runs`, with the uninterrupted one's results in "whole"."""
    made: dict[str, Runs] = {}

    def get(kind: str) -> Runs:
        if kind not in made:
            made[kind] = whole_run(tmp_path_factory.mktemp("runs"), babbler, kind)
            assert made[kind].results("whole")["resumed"] is None
            assert not (made[kind].directory / "whole" / NAME).exists()
        return made[kind]

    return get


@pytest.fixture(scope="module")
def trees(uninterrupted) -> Runs:
    return uninterrupted("trees")


SIGNALS = pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@pytest.mark.parametrize("kind", HOW)
@SIGNALS
def test_an_interrupted_run_goes_on(kind, number, status, uninterrupted):
    run, records = uninterrupted(kind), HOW[kind][2]
    name = f"stopped {status}"
    stopped = run.stopped(name, records, number=number)
    assert stopped.exit_code == status
    assert stopped.output.startswith(f"cecompile: interrupted ({signal.Signals(number).name}); continue with: ")
    assert len(stopped.output.splitlines()) == 1
    assert stopped.output.endswith("--resume\n")
    assert [p.name for p in (run.directory / name).iterdir()] == [NAME]
    refused = run(name)
    assert refused.exit_code == 2
    assert "--resume goes on" in refused.output

    again = run(name, "--resume")
    assert again.exit_code == 0, again.output
    resumed = run.results(name)["resumed"]
    assert sum(n for kind, n in resumed.items() if kind != "from") == records
    assert run.results(name)["headline"]["seconds"] is None
    assert "no latency counts as a headline" in " ".join(again.output.split())
    assert "<- headline" not in again.output
    assert not (run.directory / name / NAME).exists()
    for file in {p.name for p in (run.directory / "whole").iterdir()} - {"results.json"}:
        assert (run.directory / name / file).read_bytes() == (run.directory / "whole" / file).read_bytes()
    nothing = run(name, "--resume")
    assert nothing.exit_code == 2
    assert "no interrupted run to resume" in nothing.output


def test_every_point_of_resumption_gives_the_same(trees):
    """Stopped after each pass, resumed, stopped again after the next, to the end."""
    passes = sum(bucket["runs"] for bucket in trees.results("whole")["plan"]["buckets"])
    assert passes >= 4
    assert trees.stopped("bit by bit", 1).exit_code == 130
    for _ in range(passes - 1):
        assert trees.stopped("bit by bit", 1, "--resume").exit_code == 130
    assert trees.go_on("bit by bit")["passes"] == passes


@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
def test_from_a_damaged_record_on_all_is_computed_again(place, trees):
    name = f"damaged {place}"
    trees.stopped(name, 4)
    path = trees.directory / name / NAME
    content = bytearray(path.read_bytes())
    ends = [end for *_, end in read(bytes(content))]
    at = ends[0] + int(place * (len(content) - ends[0]))
    content[at] ^= 4
    path.write_bytes(content)
    assert (trees.go_on(name) or {"passes": 0})["passes"] == sum(end <= at for end in ends[1:])


@pytest.fixture(scope="module")
def stopped(trees) -> Runs:
    """A run that was interrupted; its journal is in "stopped"."""
    assert trees.stopped("stopped", 3).exit_code == 130
    return trees


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (["--limit", 39], "data digest is"),
        (["--tokens-per-bucket", 512], "plan is"),
        (["--engine", "reference"], "engine is reference, was eager"),
        (["--dtype", "bfloat16"], "dtype is bfloat16, was float32"),
    ],
)
def test_another_run_is_not_gone_on_with(changes, difference, stopped):
    before = (stopped.directory / "stopped" / NAME).read_bytes()
    refused = stopped("stopped", "--resume", *changes)
    assert refused.exit_code == 2, refused.output
    assert len(refused.output.splitlines()) == 1
    assert "cannot be resumed" in refused.output
    assert difference in refused.output
    assert "continue with" not in refused.output
    assert (stopped.directory / "stopped" / NAME).read_bytes() == before


def test_another_model_or_version_is_not_gone_on_with(stopped, tmp_path, monkeypatch):
    save_demo_llama(tmp_path, max_position_embeddings=512, initializer_range=0.31)
    assert "model fingerprint is" in stopped("stopped", "--resume", "--model", tmp_path).output
    monkeypatch.setattr("cecompile.results.write.platform.python_version", lambda: "3.99")
    assert "python is 3.99, was" in stopped("stopped", "--resume").output


def test_resume_names_its_output_and_excludes_overwrite(tmp_path):
    for arguments in (["--resume"], ["--resume", "--overwrite", "--output", str(tmp_path)]):
        assert "--resume: goes on with the run in --output" in run_command("eval", *arguments, exit_code=2)
    missing = run_command("eval", "--resume", "--output", tmp_path / "none", exit_code=2)
    assert "no interrupted run to resume" in missing
    assert not list(tmp_path.iterdir())


def test_only_the_first_of_repeated_runs_is_journaled(trees, monkeypatch):
    passes = sum(bucket["runs"] for bucket in trees.results("whole")["plan"]["buckets"])
    added, add = [], Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, *record: (added.append(record[1]), add(self, *record))[1])
    assert trees("repeated", "--repeat", 3).exit_code == 0
    assert added == list(range(passes))
    assert trees.results("repeated")["inference_s"]["runs"] == 3


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_what_a_stopped_run_was_writing_is_cleared_away(how, trees):
    name = f"begun {how}"
    trees.stopped(name, 3)
    (trees.directory / name / ".samples.jsonl.1").write_text("half")
    assert trees(name, how).exit_code == 0
    assert sorted(p.name for p in (trees.directory / name).iterdir()) == ["results.json", "samples.jsonl"]
    assert (trees.results(name)["resumed"] is None) == (how == "--overwrite")
    assert trees.samples(name) == trees.samples("whole")


def test_a_model_loaded_elsewhere_is_not_journaled(babbler, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(babbler).eval()
    scorer = Scorer.from_model(model, AutoTokenizer.from_pretrained(babbler), engine="eager")
    questions = read_questions(write_rows(tmp_path / "rows.jsonl", ROWS[:4]))
    with Journal(tmp_path / "out") as journal, pytest.raises(UserError, match="no fingerprint"):
        evaluate(scorer, questions, output=tmp_path / "out", journal=journal)
    assert not (tmp_path / "out").exists()
    assert evaluate(scorer, questions, output=tmp_path / "out").results["resumed"] is None


@SIGNALS
def test_interrupted_while_loading_there_is_nothing_to_resume(number, status, trees):
    load = Runtime.load

    def stopped(self, *arguments):
        os.kill(os.getpid(), number)
        return load(self, *arguments)

    done = trees.patched("early", Runtime, "load", stopped)
    assert done.exit_code == status
    assert done.output == f"cecompile: interrupted ({signal.Signals(number).name}); nothing to resume\n"
    assert not (trees.directory / "early").exists()


EVENTS = ("click", "torch.nn", "torch", "transformers", "the journal")


@pytest.mark.process
@pytest.mark.parametrize("event", EVENTS)
def test_a_process_that_is_stopped_ends_with_one_line(event, babbler, tmp_path):
    """As from a terminal: the signal goes to the whole process group, once a module is imported or something journaled.

    Python writes every import to standard error. The run repeats itself until it is stopped.
    """
    log, output = tmp_path / "log", tmp_path / "out"
    run = Runs(tmp_path, babbler, ROWS, "--engine", "eager", "--repeat", 999999, "--output", output)
    command = [sys.executable, "-X", "importtime", "-m", "cecompile", "eval", *run.arguments]

    def happened() -> bool:
        if event == "the journal":
            path = output / NAME
            return path.exists() and len(list(read(path.read_bytes()))) > 1  # after the header
        lines = log.read_text().splitlines()
        return any(line.startswith("import time:") and line.split()[-1] == event for line in lines)

    with log.open("w") as written_to:
        pipes = {"stdout": subprocess.PIPE, "stderr": written_to}
        process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    try:
        wait_until(happened, process)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=HANG)
    finally:
        process.kill()
    [said] = [line for line in log.read_text().splitlines() if not line.startswith("import time:")]
    rest = "; continue with: " if event == "the journal" else ""
    assert said.startswith(f"cecompile: interrupted (SIGINT){rest}")
    assert process.returncode == 130
    assert out == ""
