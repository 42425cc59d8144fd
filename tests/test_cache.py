"""The compile cache: warm is faster and the same, and nothing damaged, foreign or half-written is ever run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.forked import run_command
from support.rows import write_rows
from support.runs import results, run_process
from support.waiting import HANG

import cecompile
from cecompile.compile_cache.store import COLD, PARTLY, WARM, CompileCache, ProbeResult, remove_workspaces
from cecompile.errors import UserError
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket, Geometry

FACTS = {"model": "a model", "dtype": "float32", "device": {"name": "cpu"}, "versions": {"torch": "1"}}
BUCKETS = [Bucket(2, 512, 256), Bucket(1, 256, 256)]
GEOMETRY = Geometry(2, 512, 256, False)
ROWS = [{"query": f"The bread number {i} is", "choices": ["good", "not so good", "late"], "gold": 0} for i in range(8)]


def run(*arguments: str, cache: Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = run_command([*arguments, "--cache-dir", str(cache)], os.environ | environment)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory; the compiler's variables are put back afterwards."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, str(tmp_path / "none")))
    yield CompileCache(tmp_path / "cache")
    remove_workspaces()


@pytest.fixture(scope="module")
def scoring(tiny_llama, tmp_path_factory) -> list[str]:
    """The model, the data and the device of `eval` and `warm`."""
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)
    return ["--model", str(tiny_llama), "--data", str(data), "--device", "cpu", "--engine", "compiled"]


@pytest.fixture(scope="module")
def built(scoring, tmp_path_factory) -> tuple[Path, Path]:
    """A cache that `cecompile warm` has filled, and the results of a cold run without that cache."""
    place = tmp_path_factory.mktemp("built")
    run("warm", *scoring, cache=place / "cache")
    run("eval", *scoring, "--output", str(place / "out"), cache=place / "other")
    return place / "cache", place / "out"


def put(cache: CompileCache, files: dict[str, str], buckets=BUCKETS) -> None:
    """An entry as if the compiler had written these files."""
    entry = cache.open(FACTS)
    for name, text in files.items():
        path = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    entry.publish(buckets, GEOMETRY, ProbeResult("sdpa"))
    remove_workspaces()


def compiler_sees(cache: CompileCache) -> set[str]:
    place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    return {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()} - {"alive"}


def test_what_is_published_is_there_for_the_next(cache):
    put(cache, {"ab/one.py": "1", "fxgraph/x/y": "2", "ab/one.lock": ""})
    entry = cache.open(FACTS)
    assert entry.state(BUCKETS) == (WARM, "every bucket was compiled before")
    assert compiler_sees(cache) == {"ab/one.py", "fxgraph/x/y"}
    assert entry.state([*BUCKETS, Bucket(4, 512, 256)])[0] == PARTLY
    assert entry.state([Bucket(8, 128, 256)])[0] == COLD


def test_another_fact_is_another_entry_and_is_named(cache):
    put(cache, {"a": "1"})
    entry = cache.open(FACTS | {"versions": {"torch": "2"}})
    assert entry.state(BUCKETS) == (COLD, "compiled before with other versions torch 1 (now 2)")
    assert compiler_sees(cache) == set()


@pytest.mark.parametrize(("device", "state"), [("cpu", WARM), ("NVIDIA H100", PARTLY)])
def test_decoding_is_compiled_on_a_gpu_only(cache, device, state):
    cache.open(FACTS | {"device": {"name": device}}).publish(BUCKETS, GEOMETRY, ProbeResult("sdpa"))
    entry = cache.open(FACTS | {"device": {"name": device}})
    assert entry.state([*BUCKETS, DecodeShape(4096, 32, (256, 32))])[0] == state


GIVEN = {"attention": "sdpa", "inputs_are_free": True}
NOT_FOUND = [None, {"attention": 1, "inputs_are_free": None}, GIVEN | {"inputs_are_free": "yes"}, GIVEN | {"more": 1}]


@pytest.mark.parametrize("found", NOT_FOUND)
def test_what_was_found_out_by_trying_is_kept_and_nothing_else_taken_for_it(cache, found):
    cache.open(FACTS).publish(BUCKETS, GEOMETRY, ProbeResult("sdpa", True))
    assert cache.open(FACTS).found == ProbeResult("sdpa", True)
    (path,) = cache.manifests()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"found": found}))
    entry = cache.open(FACTS)
    assert entry.found is None
    assert entry.state(BUCKETS)[0] == COLD


def damages(path: Path, other: Path):
    """Ways to spoil a file, and what puts it back."""
    content = path.read_bytes()

    def restore():
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    yield "truncated", lambda: path.write_bytes(content[: len(content) // 2]), restore
    yield "zeroed", lambda: path.write_bytes(bytes(len(content))), restore
    yield "replaced", lambda: path.write_bytes(other.read_bytes() + b" "), restore
    yield "removed", path.unlink, restore
    yield "unreadable", lambda: (path.unlink(), path.mkdir()), restore
    yield "a link", lambda: (path.unlink(), path.symlink_to(other)), restore


@pytest.mark.process
def test_every_file_damaged_in_turn_is_found_and_nothing_of_the_entry_used(built, monkeypatch, tmp_path):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    source, _ = built
    place = tmp_path / "cache"
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("work-*", "lock"))
    cache = CompileCache(place)
    (summary,) = cache.entries()
    (manifest_path,) = place.glob("*.json")
    manifest = json.loads(manifest_path.read_text())
    files = [place / manifest["directory"] / name for name in manifest["files"]]
    buckets = [Bucket(r, n, 256) for r, n in summary.buckets]
    assert len(files) > 10
    filled = [f for f in files if f.stat().st_size]
    for path in [manifest_path, *filled]:
        for kind, spoil, restore in damages(path, filled[0] if path != filled[0] else filled[1]):
            spoil()
            entry = cache.open(manifest["facts"])
            state, reason = entry.state(buckets)
            assert state == COLD, (path, kind)
            assert reason.count("\n") == 0, (path, kind)
            if kind != "removed" or path != manifest_path:
                assert path.name in reason, (path, kind, reason)
                assert "built again" in reason, (path, kind, reason)
            assert compiler_sees(cache) == set(), (path, kind)
            restore()
    assert cache.open(manifest["facts"]).state(buckets)[0] == WARM
    remove_workspaces()


@pytest.mark.process
def test_a_damaged_file_is_reported_rebuilt_and_changes_nothing(built, scoring, tmp_path):
    source, cold = built
    place = tmp_path / "cache"
    shutil.copytree(source, place)
    compiled = max(place.rglob("*.so"), key=lambda p: p.stat().st_size)
    compiled.write_bytes(compiled.read_bytes()[:-100])
    run("eval", *scoring, "--output", str(tmp_path / "a"), cache=place)
    run("eval", *scoring, "--output", str(tmp_path / "b"), "--require-warm", cache=place)
    before, after = (results(tmp_path / out)["cache"] for out in ("a", "b"))
    assert before["state"] == COLD
    assert compiled.name in before["reason"]
    assert after["state"] == WARM
    for out in ("a", "b"):
        assert (tmp_path / out / "samples.jsonl").read_bytes() == (cold / "samples.jsonl").read_bytes()


COUNTED = """
import json, sys
from cecompile.cli import cli
cli(sys.argv[1:], standalone_mode=False)
from torch._dynamo.utils import counters
print(json.dumps(counters["inductor"]))
"""


@pytest.mark.process
def test_a_warm_cache_compiles_nothing_and_gives_the_same(built, scoring, tmp_path):
    """How much less time that takes is asserted in tests/benchmarks."""
    source, cold = built
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    command = ["eval", *scoring, "--output", str(tmp_path / "out"), "--cache-dir", str(source)]
    done = subprocess.run([sys.executable, "-c", COUNTED, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["fxgraph_cache_hit"] > 0
    assert counted.get("fxgraph_cache_miss", 0) == 0
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    first, second = results(cold), results(tmp_path / "out")
    assert (first["cache"]["state"], second["cache"]["state"]) == (COLD, WARM)
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == (cold / "samples.jsonl").read_bytes()


@pytest.mark.process
def test_paths_with_spaces_and_letters_compile(built, scoring, tmp_path):
    """Below such a directory are torch, and the cache."""
    place = tmp_path / "공 백 'x'"
    place.mkdir()
    (place / "installed").symlink_to(Path(torch.__file__).parents[1])
    path = os.pathsep.join([str(Path(cecompile.__file__).parents[1]), str(place / "installed")])
    run("eval", *scoring, "--output", str(place / "out"), cache=place / "cache", PYTHONPATH=path)
    engine = results(place / "out")["engine"]
    assert (engine["name"], engine["note"]) == ("compiled", None)
    assert (place / "out" / "samples.jsonl").read_bytes() == (built[1] / "samples.jsonl").read_bytes()


@pytest.mark.process
def test_require_warm_refuses_to_compile(scoring, tmp_path):
    how = ("--output", str(tmp_path / "out"), "--require-warm")
    done = run("eval", *scoring, *how, cache=tmp_path / "empty", status=1)
    assert done.stderr.endswith("the compile cache is cold: this model was not compiled before\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_warm_for_data_not_yet_seen(tiny_llama, scoring, tmp_path):
    how = {"cache": tmp_path / "cache"}
    run("warm", "--model", str(tiny_llama), "--device", "cpu", "--max-depth", "64", "--tokens-per-bucket", "256", **how)
    later = ("--output", str(tmp_path / "out"), "--require-warm", "--tokens-per-bucket", "256")
    run("eval", *scoring, *later, **how)
    listed = run("warm", "--list", **how).stdout
    assert "1 x 256" in listed
    assert "1 entries" in listed
    (manifest,) = (tmp_path / "cache").glob("*.json")
    manifest.write_text("{}")
    assert "0 entries" in run("warm", "--prune", "--list", **how).stdout
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["lock"]


@pytest.mark.process
@pytest.mark.parametrize("mode", [0o755, 0o777, 0o770, 0o701])
def test_a_directory_open_to_others_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    problem = f"cache directory: open to other users (mode {mode:04o}): chmod 700 {tmp_path}"
    assert run("warm", "--list", cache=tmp_path, status=2).stderr == f"cecompile: {tmp_path}: {problem}\n"


def test_somebody_elses_directory_is_refused(tmp_path):
    """Root gives one away; others take the system's."""
    theirs = Path("/proc")
    if os.geteuid() == 0:
        theirs = tmp_path
        theirs.chmod(0o700)
        os.chown(theirs, 12345, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        CompileCache(theirs)


@pytest.mark.process
def test_without_a_place_for_a_cache_a_run_goes_on_and_says_so(scoring, tmp_path):
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "cache"
    run_process("eval", *scoring, "--output", tmp_path / "out", CECOMPILE_CACHE=str(nowhere))
    assert results(tmp_path / "out")["cache"] is None
    assert results(tmp_path / "out")["engine"]["note"].startswith("compiled without a cache: ")
    asked = run("eval", *scoring, "--output", str(tmp_path / "other"), cache=nowhere, status=2)
    assert "cache directory: Not a directory" in asked.stderr


WRITER = """
import json, os, sys
from pathlib import Path
from cecompile.compile_cache.store import CompileCache, ProbeResult
from cecompile.workload.plan import Bucket, Geometry
place, name, facts = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

def write(files):
    cache = CompileCache(place)
    entry = cache.open(facts)
    work = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    for n in range(files):
        (work / f"{name}{n}").write_text(f"content of {name}{n} " * 500)
    entry.publish([Bucket(1, 128 * (1 + ord(name) - ord("a")), 256)], Geometry(1, 128, 256, False), ProbeResult("sdpa"))
"""

TEN_TIMES = """
for i in range(10):
    write(20)
"""

KILLED = """
import signal
from cecompile.compile_cache import store as module

def killed_at(moment):
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != module.__file__:
            return None
        lines += event == "line"
        if lines > moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

for line in sys.stdin:
    process = os.fork()
    if not process:
        killed_at(int(line))
        write(2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def usable(cache: CompileCache) -> set[str]:
    """The entry's files, which are whole if it opens."""
    entry = cache.open(FACTS)
    assert entry.note is None
    place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    files = compiler_sees(cache)
    for name in files:
        assert (place / name).read_text() == f"content of {name} " * 500
    remove_workspaces()
    return files


def writer(cache: CompileCache, name: str, code: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER + code, str(cache.directory), name, json.dumps(FACTS)], **pipes
    )


@pytest.mark.process
def test_two_writers_at_once_lose_nothing(cache):
    both = [writer(cache, name, TEN_TIMES) for name in "ab"]
    assert [one.wait(HANG) for one in both] == [0, 0]
    assert usable(cache) == {f"{name}{n}" for name in "ab" for n in range(20)}
    assert cache.open(FACTS).state([Bucket(1, 128, 256), Bucket(1, 256, 256)])[0] == WARM


@pytest.mark.process
@pytest.mark.parametrize("published", [False, True])
def test_a_writer_killed_at_any_moment_leaves_the_cache_usable(published, cache):
    """Before every line of the cache's module in turn, until one writer comes to its end alive."""
    whole, one = {"a0", "a1"}, writer(cache, "a", KILLED)
    if published:
        put(cache, {name: f"content of {name} " * 500 for name in whole})
    status, seen = -signal.SIGKILL, []
    while status == -signal.SIGKILL:
        one.stdin.write(f"{len(seen)}\n")
        one.stdin.flush()
        status = int(one.stdout.readline())
        seen.append(usable(cache))
        assert seen[-1] in ((whole,) if published else (set(), whole)), len(seen)
    assert status == 0
    assert seen[-1] == whole
    assert len(seen) > 100
    if not published:  # once the entry is there, the next find it
        assert seen == sorted(seen, key=len)
    one.stdin.close()
    assert one.wait(HANG) == 0
    with cache.locked():
        cache.sweep()
    kept = {p.name.split("-")[0] for p in cache.directory.iterdir()} - {"lock"}
    assert len(kept) == 2  # a manifest and its directory: KEY.json, KEY
