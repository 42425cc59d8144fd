"""Several processes share an evaluation: the same results for any number, and whoever is lost, the work is not."""

import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support.rows import CHATS, MANY_ROWS, write_rows
from support.runs import results, run_command
from support.torchrun import RANK, alone, alone_and_by, command, environment, finished, lines, same, torchrun
from support.waiting import HANG, wait_until
from torch.distributed import HashStore
from transformers import AutoConfig

from cecompile import Scorer, read_questions
from cecompile.errors import AlreadyReportedError, UserError
from cecompile.planning.bucket_size import Sizing
from cecompile.planning.options import RunOptions
from cecompile.ranks import Ranks, has_part_in, meet
from cecompile.results.journal import NAME, PASSES, Journal, journals_in
from cecompile.results.read import read_results
from cecompile.run.language_model import resolve_device

pytestmark = pytest.mark.usefixtures("one_thread")
EAGER = {"engine": "eager", "tokens_per_bucket": 256}


@pytest.fixture(scope="module")
def base(babbler, tmp_path_factory) -> list[str]:
    """`eval` of the tiny model in many small passes."""
    return command(babbler, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", MANY_ROWS), EAGER)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """Results of one process alone."""
    output = tmp_path_factory.mktemp("whole") / "out"
    torch.set_num_threads(1)
    alone([*base, "--output", str(output)])
    return output


@pytest.mark.process
def test_four_ranks_and_one_give_the_same(base, whole, tmp_path):
    done = torchrun(4, [*base, "--output", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in ") == 1
    same(whole, tmp_path / "out")
    ranks, plan = results(tmp_path / "out")["ranks"], results(whole)["plan"]
    assert results(whole)["ranks"] is None
    assert ranks["size"] == len(ranks["devices"]) == 4
    assert sum(ranks["passes"]) == sum(bucket["runs"] for bucket in plan["buckets"])
    assert sum(ranks["tokens"]) == plan["useful_tokens"]
    assert read_results(tmp_path / "out")["ranks"] == ranks


KINDS = {
    "trees, repeated": {"rows": MANY_ROWS[:40], "how": EAGER, "repeat": 3},
    "reference": {"rows": MANY_ROWS[:10], "how": {"engine": "reference"}},
    "chats": {"rows": CHATS * 4, "how": EAGER | {"new_tokens": 6}},
    "chats, reference": {"rows": CHATS[:3], "how": {"engine": "reference", "new_tokens": 2}},
    "gone on with": {"rows": MANY_ROWS[:40], "how": EAGER},
}


@pytest.mark.process
def test_two_ranks_and_one_give_the_same_whatever_runs(babbler, tmp_path):
    alone_and_by(2, tmp_path, {name: run | {"model": babbler} for name, run in KINDS.items()})
    assert results(tmp_path / "chats")["answers"]["decoded_tokens"] > 0


@pytest.mark.process
def test_a_rank_that_is_killed_ends_the_run_which_one_process_goes_on_with(base, whole, tmp_path, monkeypatch):
    output = tmp_path / "out"
    done = torchrun(2, [*base, "--output", str(output)], DIE_AFTER=3)
    assert done.returncode == 1
    (line,) = lines(done)
    assert line.startswith("cecompile: interrupted (SIGTERM); continue with: ")
    assert [path.name for path in journals_in(output)] == [".journal-1.partial", NAME]
    kept = finished(output)
    passes = sum(bucket["runs"] for bucket in results(whole)["plan"]["buckets"])
    assert 3 <= len(kept) < passes

    assert "--resume goes on with it" in run_command(*base, "--output", output, exit_code=2)
    torch.set_num_threads(2)
    other = run_command(*base, "--output", output, "--resume", exit_code=2)
    assert "threads (OMP_NUM_THREADS) is 2, was 1" in other
    torch.set_num_threads(1)
    added, add = [], Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, *record: (added.append(record[1]), add(self, *record))[1])
    alone([*base, "--output", str(output), "--resume"])
    assert set(added).isdisjoint(kept)
    assert len(added) == passes - len(kept)
    assert results(output)["resumed"]["passes"] == len(kept)
    same(whole, output)


@pytest.mark.process
def test_torchrun_starts_lost_ranks_again_and_they_go_on(base, whole, tmp_path):
    done = torchrun(2, [*base, "--output", str(tmp_path / "out")], restarts=1, DIE_AFTER=3)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out")["resumed"]["passes"] >= 3
    same(whole, tmp_path / "out")


@pytest.mark.process
def test_without_an_agent_ranks_agree_and_a_lost_one_is_noticed():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(RANK), "agree"]
    first, second = (subprocess.Popen(command, env=environment(RANK=rank, **group), **pipes) for rank in range(2))
    assert second.wait(HANG) == -signal.SIGKILL
    out, said = first.communicate(timeout=HANG)
    (agreed,) = (line for line in out.splitlines() if not line.startswith("[Gloo]"))  # torch 2.8's gloo says so much
    assert json.loads(agreed) == {
        "everywhere": True, "gather": True, "collect": True, "least": 4, "any": [True, False], "says": 1, "first": 7,
        "taken": ["a", "b", "c", "d", "e", "f"], "again": 9,
    }  # fmt: skip
    assert said == "another of the 2 ranks was lost\n"


@pytest.mark.process
def test_results_that_are_there_are_refused_once(base, tmp_path):
    """By torchrun itself."""
    (tmp_path / "results.json").write_text("{}")
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RANK)]
    command = [sys.executable, "-m", *ranks, *base, "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=HANG)
    assert lines(done) == [f"cecompile: {tmp_path}: holds results already; --overwrite replaces them"]
    assert "exitcode  : 2" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


# ---- in this process


class Two(Ranks):
    """Rank 0 of two, of which the other has what it is given."""

    size = local_size = 2

    def __init__(self, other: object) -> None:
        self.other = other

    def gather(self, mine):
        return [mine, self.other]

    def all_reduce_min(self, n):
        return min(n, self.other)


def test_ranks_that_differ_are_told_apart():
    Two({"torch": "2.13"}).all_same({"torch": "2.13"})
    with pytest.raises(UserError, match=r"^rank 1: torch is 2\.12, rank 0 has 2\.13$"):
        Two({"torch": "2.12"}).all_same({"torch": "2.13"})


def test_what_rank_0_refuses_is_refused_everywhere():
    def refuse():
        raise UserError("no")

    class Second(Ranks):
        rank, size = 1, 2

        def broadcast(self, mine):
            return None, "no"

    with pytest.raises(UserError, match="no") as caught:
        Ranks().first_does(refuse)
    assert not isinstance(caught.value, AlreadyReportedError)
    with pytest.raises(AlreadyReportedError, match="no"):
        Second().first_does(refuse)


def test_ranks_meet_whoever_was_there_before():
    store = HashStore()
    store.set("is/1", "killed before anybody else came")
    for before in range(3):
        with ThreadPoolExecutor() as threads:
            key = "all" if before else "is/0"  # set once rank 0 has found the others of last time, or is there
            then = store.get(key) if before else None
            met = [threads.submit(meet, store, 0, 3)]
            wait_until(lambda key=key, then=then: store.check([key]) and store.get(key) != then)
            met += [threads.submit(meet, store, rank, 3) for rank in (1, 2)]
            assert {one.result(HANG) for one in met} == {(met[0].result()[0], before)}


def test_ranks_that_do_not_come_are_not_waited_for(monkeypatch):
    monkeypatch.setattr("cecompile.ranks.JOIN", timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="not all came"):
        meet(HashStore(), 0, 2)


def test_who_waits_for_a_rank_says_so(monkeypatch, capsys):
    from torch.distributed import HashStore

    from cecompile.ranks import Group

    monkeypatch.setattr("cecompile.ranks.JOIN", timedelta(seconds=0.3))
    monkeypatch.setattr("cecompile.ranks.NOTICE", 0.0)
    with pytest.raises(RuntimeError, match="not all came"):
        meet(HashStore(), 0, 4)
    ending = ", for at most 0 minutes; Ctrl-C stops\n"
    assert capsys.readouterr().err == f"cecompile: rank 0 waits for other ranks of 4, not here yet: 1, 2, 3{ending}"
    store = HashStore()
    for rank in (2, 3):  # of those that wait for rank 0, one says so
        with pytest.raises(RuntimeError, match="not all came"):
            meet(store, rank, 4)
    assert capsys.readouterr().err == f"cecompile: rank 2 waits for other ranks of 4, not here yet: 0{ending}"
    group = object.__new__(Group)
    group.rank = 1
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        group._connected("127.0.0.1", port)
    assert capsys.readouterr().err == f"cecompile: rank 1 waits for rank 0 at 127.0.0.1:{port}{ending}"


@pytest.mark.parametrize("command", ["eval", "plan", "warm"])
@pytest.mark.parametrize("rank", ["2", "7", "9" * 5000, "-1", "", "one"])
def test_a_rank_that_is_none_is_refused_at_once(command, rank, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "RANK: " in run_command(command, "--device", "cpu", exit_code=2)


def test_ranks_on_one_device_share_its_memory(babbler, monkeypatch):
    monkeypatch.setattr("cecompile.device.available", lambda device: 4 << 30)
    how = (str(babbler), AutoConfig.from_pretrained(babbler), torch.device("cpu"), RunOptions())
    for others, limit in ((1 << 30, 1 << 30), (3 << 30, 2 << 30)):  # the least that either has
        sizing = Sizing(*how, ranks=Two(others), sharers=2)
        sizing.fitting(sizing.geometry(100, blocks=False), 100, "eager")
        assert sizing.room.limit == limit


def test_more_ranks_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 ranks on this machine, 1 CUDA devices; --device cuda:0"):
        resolve_device("auto", Two(None))


@pytest.mark.parametrize(
    ("command", "parts"), [("eval", [True] * 4), ("warm", [True, False] * 2), ("plan", [True, False, False, False])]
)
def test_who_has_a_part_in_a_command(command, parts, monkeypatch):
    """Of four ranks on two machines."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, part in enumerate(parts):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        assert has_part_in(command) == part
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert has_part_in(command)


def test_an_environment_that_is_not_complete(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANK: ''"):
        Ranks.from_environment()


def left_by_another(directory: Path) -> None:
    with Journal(directory, ranks=second()) as journal:
        journal.begin({})
        journal.add(PASSES, 0, b"old")


def test_overwriting_removes_what_other_ranks_have_left(base, whole, tmp_path):
    left_by_another(tmp_path)
    alone([*base, "--output", str(tmp_path), "--overwrite"])
    same(whole, tmp_path)


def test_before_ranks_may_be_started_again_old_journals_are_removed(tmp_path):
    """For a rank that is started again takes over what it finds."""
    left_by_another(tmp_path)
    ranks = Ranks()
    ranks.restarts = 1
    Journal(tmp_path, ranks=ranks)
    assert journals_in(tmp_path) == []


def test_where_another_rank_runs_out_of_memory_all_take_smaller_buckets(base, tmp_path):
    class First(Ranks):
        def any(self, flag):
            asked.append(flag)
            return flag or len(asked) == 2  # after the attention, the first warm-up

    ranks, asked = First(), []
    scorer = Scorer.from_pretrained(base[2], device="cpu", engine="eager", tokens_per_bucket=512, ranks=ranks)
    scores = scorer.score(read_questions(base[4])[:40])
    assert scores.workload.plan.buckets[0].slots == 128  # a quarter, as on any CPU
    assert scorer.runtime.mode.note == "buckets made smaller: memory ran out with 512 tokens"
    assert asked[1:] == [False, False]


def test_the_journal_of_any_rank_is_gone_on_with(tmp_path):
    with Journal(tmp_path, ranks=second()) as journal:
        journal.begin({"plan": 1})
        journal.add(PASSES, 5, b"five")
        with pytest.raises(UserError, match="another process"):
            Journal(tmp_path, resume=True)
        assert journal.resumable
    with Journal(tmp_path, resume=True) as journal, pytest.raises(UserError, match="plan is 2, was 1"):
        journal.expect({"plan": 2})
    with Journal(tmp_path, resume=True) as journal:
        journal.begin({"plan": 1})
        assert journal.get(PASSES, 5) == b"five"
        assert journal.resumable
        assert len(journals_in(tmp_path)) == 2
    assert [path.name for path in journals_in(tmp_path)] == [".journal-1.partial"]  # nothing was added to the other
    (tmp_path / NAME).write_bytes(b"cut off")
    with Journal(tmp_path, resume=True) as journal:
        journal.begin({"plan": 1})
        journal.add(PASSES, 6, b"six")
    with Journal(tmp_path, resume=True) as journal:
        assert [journal.get(PASSES, i) for i in (5, 6)] == [b"five", b"six"]
        journal.begin({"plan": 1})
        journal.remove()
    assert journals_in(tmp_path) == []


def second() -> Ranks:
    """Rank 1, with nobody to wait for."""
    ranks = Ranks()
    ranks.rank = ranks.local_rank = 1
    return ranks
