"""The command in a shell: pipes and devices it prints to, processes it starts, signals, two runs at once."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import forked
from support.rows import ROWS, write_rows
from support.runs import HOW, Runs, results, run_command
from support.shell import command_to
from support.waiting import HANG, wait_until

from cecompile.results.journal import NAME

COMMAND = [sys.executable, "-m", "cecompile"]


# ---- where it prints


def printed(place: str, *arguments: object, encoding: str = "utf-8", **variables: str) -> subprocess.CompletedProcess:
    """Runs the command line with its standard output in such a place."""
    return forked.run(command_to, (place, encoding, *map(str, arguments)), os.environ | variables)


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory) -> list[str]:
    data = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS[:6])
    return ["--model", str(tiny_llama), "--data", str(data), "--device", "cpu", "--engine", "eager"]


FULL = "cecompile: standard output cannot be written: No space left on device; all else was done\n"


@pytest.mark.process
@pytest.mark.parametrize(("place", "status", "said"), [("full", 2, FULL), ("closed pipe", 0, ""), ("closed", 0, "")])
def test_a_result_is_written_whatever_becomes_of_the_table(place, status, said, base, tmp_path):
    done = printed(place, "eval", *base, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (status, said)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "samples.jsonl"]
    assert results(tmp_path / "out")["headline"]["seconds"] > 0


@pytest.mark.process
def test_characters_that_the_encoding_lacks_are_replaced(base, tmp_path):
    name = str(tmp_path / "Ünïcödé")
    done = printed("here", "eval", *base, "--output", name, encoding="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "? 0." in done.stdout  # the sign before a standard error
    assert "?n?c?d?" in done.stdout.replace("\n", "")  # a long path goes on in the next line
    assert results(Path(name))["headline"]["seconds"] > 0


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["doctor", "--json"], ["warm", "--list"]])
def test_any_command_says_in_one_line_that_its_output_is_full(arguments):
    done = printed("full", *arguments)
    assert (done.returncode, done.stderr) == (2, FULL)
    done = printed("closed pipe", *arguments)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.process
def test_a_verdict_outlives_its_output(base, tmp_path):
    """What a check found is said, and its exit status is the command's."""
    for name in ("reference", "candidate"):
        run_command("eval", *base, "--output", tmp_path / name)
    samples = (tmp_path / "candidate" / "samples.jsonl").read_text()
    (tmp_path / "candidate" / "samples.jsonl").write_text(samples + "\n")
    done = printed("full", "compare", tmp_path / "reference", tmp_path / "candidate", "--json")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "candidate" in done.stderr


@pytest.mark.process
def test_a_pipe_that_does_not_wait_gets_everything():
    done = printed("pipe that is full", "eval", "--help")
    expected = subprocess.run([*COMMAND, "eval", "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.split() == expected.stdout.split()


@pytest.mark.process
def test_standard_error_may_be_full_or_closed_too(tmp_path):
    """A usage error keeps its exit status."""
    for end in ("2>/dev/full", "2>&-", ">&- 2>&-", "2>&1 | true; exit ${PIPESTATUS[0]}"):
        line = ["bash", "-c", f'"$0" -m cecompile eval --what {end}', sys.executable]
        assert subprocess.run(line, capture_output=True, check=False).returncode == 2


# ---- processes it starts


POOLS = """
import multiprocessing, os, signal, subprocess, sys, threading
from concurrent.futures import ProcessPoolExecutor
from cecompile.interrupt import signals_raise

fork = multiprocessing.get_context("fork")

def pools(count=40):
    for _ in range(count):
        with fork.Pool(2):
            pass

def other_library():
    import multiprocess
    for _ in range(20):
        with multiprocess.get_context("fork").Pool(2):
            pass

def pool_of_futures():
    for _ in range(10):
        with ProcessPoolExecutor(2, fork) as pool:
            assert list(pool.map(abs, [-1, -2])) == [1, 2]

def from_a_thread():
    thread = threading.Thread(target=pools)
    thread.start()
    thread.join()

def processes():
    for _ in range(40):
        one = fork.Process(target=signal.pause)
        one.start()
        one.terminate()
        one.join()
        assert one.exitcode == -signal.SIGTERM, one.exitcode

def bare():
    for _ in range(40):
        child = os.fork()
        if child == 0:
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
            signal.pause()
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM

def of_a_child():
    one = fork.Process(target=bare)
    one.start()
    one.join()
    assert one.exitcode == 0

def programs():
    for _ in range(10):
        one = subprocess.Popen(["sleep", "600"])
        one.terminate()
        assert one.wait() == -signal.SIGTERM

with signals_raise():
    ours = signal.getsignal(signal.SIGTERM)
    globals()[sys.argv[1]]()
    assert signal.getsignal(signal.SIGTERM) is ours
print("done")
"""
KINDS = ("pools", "other_library", "pool_of_futures", "from_a_thread", "processes", "bare", "of_a_child", "programs")


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_processes_started_under_the_command_die_of_sigterm(kind):
    quiet = ["-W", "ignore::DeprecationWarning"]  # Python 3.12 warns of forks beside threads
    command = [sys.executable, *quiet, "-c", POOLS, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


INTERRUPTED = """
import multiprocessing, sys, time
from cecompile import __main__, cli, interrupt

def work(number):
    if number == 0:
        print("begun", flush=True)
    time.sleep(600 if number < 2 else 0)

def command(as_json, **_):
    pool = multiprocessing.get_context("fork").Pool(4)
    if as_json:
        pool.map(work, range(4), chunksize=1)
    with pool:
        pool.map(work, range(4), chunksize=1)

interrupt.LIMIT = 2.0
cli.doctor_command.callback = command
sys.argv = ["cecompile", "doctor", *sys.argv[1:]]
__main__.main()
"""


@pytest.mark.process
@pytest.mark.parametrize("group", [True, False], ids=["group", "command alone"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["a pool in a block", "a pool that nobody ends"])
def test_a_signal_ends_the_command_and_its_processes_with_one_line(arguments, number, group):
    """As Ctrl-C in a terminal does, which reaches the whole group, or `kill`."""
    # A worker that dies amid the pool's queue keeps the queue's lock, and Python's pool waits for the lock for ever:
    # the command is then ended by force.
    command = [sys.executable, "-c", INTERRUPTED, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    assert process.stdout.readline() == "begun\n"
    (os.killpg if group else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    forced = "; ended by force after 2 seconds"
    assert said in {f"cecompile: interrupted ({name}){end}\n" for end in ("", forced)}

    def gone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(gone)


# ---- two runs at once


@pytest.fixture
def eval_to(base, tmp_path):
    """Runs `eval` in this process, with this output, in `tmp_path`."""

    def run(*more: object, exit_code: int = 0) -> str:
        return run_command("eval", *base, "--output", tmp_path / "out", *more, exit_code=exit_code)

    return run


def meanwhile(monkeypatch, owner: object, name: str, act) -> None:
    """Calls `act` once, before a function of the package runs for the first time."""
    call, calls = getattr(owner, name), []

    def called(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            act()
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("moment", ["read_windows", "write_samples"])
def test_a_second_run_is_refused_while_the_first_one_lasts(moment, options, eval_to, tmp_path, monkeypatch):
    owner = {"read_windows": "cecompile.tasks.read", "write_samples": "cecompile.run.evaluation"}[moment]
    second = []
    act = lambda: second.append(eval_to(*options, "--limit", 1, exit_code=2))  # noqa: E731
    meanwhile(monkeypatch, importlib.import_module(owner), moment, act)
    eval_to()
    assert second == [f"cecompile: {tmp_path / 'out'}: another process is writing results here\n"] or (
        moment == "write_samples" and not options and "--resume goes on with it" in second[0]
    )
    assert results(tmp_path / "out")["questions"] == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "samples.jsonl"]


def test_a_run_that_ends_while_another_one_starts_is_not_replaced(eval_to, tmp_path, monkeypatch):
    """The other run found the directory empty a moment ago."""
    from cecompile.results import journal

    meanwhile(monkeypatch, journal.Journal, "__init__", lambda: eval_to("--limit", 2))
    assert "holds results already" in eval_to(exit_code=2)
    assert results(tmp_path / "out")["questions"] == 2


def test_results_that_turn_up_during_a_run_are_not_replaced(eval_to, tmp_path, monkeypatch):
    """As from another machine, on a file system without locks. The run is not lost either."""
    from cecompile.run import evaluation

    def turn_up() -> None:
        for name in ("results.json", "samples.jsonl"):
            (tmp_path / "out" / name).write_text("theirs")

    with monkeypatch.context() as patch:
        meanwhile(patch, evaluation.provenance, "describe", turn_up)
        said = eval_to(exit_code=2)
    assert "holds results that another run has written; move them elsewhere; continue with: cecompile eval" in said
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "out" / name).read_text() == "theirs"
    assert "holds results that another run" in eval_to("--resume", exit_code=2)
    (tmp_path / "out" / "results.json").rename(tmp_path / "theirs.json")
    eval_to("--resume")
    assert results(tmp_path / "out")["questions"] == 6
    assert results(tmp_path / "out")["resumed"]


def test_what_a_crash_leaves_blocks_no_run(eval_to, tmp_path):
    (tmp_path / "out").mkdir()
    for rest in (NAME, ".journal-1.partial"):
        (tmp_path / "out" / rest).touch()
    (tmp_path / "out" / ".cecompile-abc").mkdir()
    (tmp_path / "out" / ".cecompile-abc").rmdir()
    assert "cannot be resumed" in eval_to("--resume", exit_code=2)
    eval_to()
    assert "holds results already" in eval_to(exit_code=2)
    eval_to("--overwrite", "--limit", 2)
    assert results(tmp_path / "out")["questions"] == 2


def test_an_interrupted_run_that_overwrites_can_be_resumed(babbler, tmp_path):
    """The results that it was to replace are still there, until its own are written."""
    rows, how, records = HOW["trees"]
    run = Runs(tmp_path, babbler, rows, *how)
    assert run("out", "--limit", 2).exit_code == 0
    assert run.stopped("out", records, "--overwrite").exit_code == 130
    assert run.results("out")["questions"] == 2
    done = run("out", "--resume")
    assert done.exit_code == 0, done.output
    assert run.results("out")["questions"] == len(rows)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_stopped_at_its_start_lets_the_next_one_in(number, eval_to, base, tmp_path):
    command = [*COMMAND, "eval", *base, "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "out" / NAME).exists, process)
    assert "another process is writing results here" in eval_to(exit_code=2)
    process.send_signal(number)
    process.communicate(timeout=HANG)
    eval_to()
    assert results(tmp_path / "out")["questions"] == 6
