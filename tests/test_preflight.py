"""`doctor --model` and the same trials before loading: broken set-ups one by one, each named with its fix."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.orin import ORIN_GPU, make_orin, orin_facts, write
from support.runs import run_command
from support.waiting import HANG

from cecompile import Question, Scorer, device, procfs
from cecompile.doctor import machine, trials
from cecompile.doctor.machine import read_jetson
from cecompile.doctor.preflight import Case, Preflight, fitting_profile, judge_case, line, print_preflight
from cecompile.doctor.trials import Allocation, Attempt, PlannedRun, Reading, Trials, try_memory
from cecompile.errors import UserError
from cecompile.planning.memory import SYSTEM
from cecompile.run.warm_cache import warm

CPU = torch.device("cpu")
NEEDED = 28_000_000_000
QUESTIONS = [Question("0", "The question is", ("easy", "not so easy"), 0)]


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A tool that is slow on a busy machine is no missing one."""
    monkeypatch.setattr(machine, "PATIENCE", HANG)


@pytest.fixture
def orin(tmp_path) -> Path:
    """A Jetson AGX Orin 32GB that is ready for a model of 14 billion parameters."""
    make_orin(tmp_path)
    (tmp_path / "bin/nvpmodel").unlink()  # as in a container
    for node in ("dev/nvmap", "dev/nvgpu/igpu0/ctrl", "dev/dri/renderD128"):
        write(tmp_path / node, "")
    write(tmp_path / "proc/meminfo", "MemTotal: 31434752 kB\nMemFree: 29360128 kB\nMemAvailable: 29884416 kB\n")
    return tmp_path


def planned(root: Path, **changes) -> PlannedRun:
    run = PlannedRun(
        "phi-3-medium", torch.device("cuda", 0), torch.bfloat16, "compiled", "flex", another_will_do=False,
        head_size=128, needed_bytes=NEEDED, predicted_bytes=NEEDED, cache=root / "cache",
    )  # fmt: skip
    return replace(run, **changes)


@pytest.fixture
def ready(orin, monkeypatch) -> Case:
    monkeypatch.setattr(device, "is_integrated", lambda device: device.type == "cuda")
    done = Trials(
        trials.read_nodes(orin), Allocation(NEEDED, NEEDED, NEEDED), procfs.read_meminfo(orin)["MemFree"],
        Reading(27_900_000_000, 2**26, 0.05), 10**11, Attempt(9.0), Attempt(0.1),
    )  # fmt: skip
    return Case(planned(orin), done, ORIN_GPU, read_jetson(orin, ""), orin_facts(orin))


def tried(case: Case, **changes) -> Case:
    return replace(case, trials=replace(case.trials, **changes))


def node_is_missing(case: Case, root: Path, patch) -> Case:
    (root / "dev/nvmap").unlink()
    return tried(case, nodes=trials.read_nodes(root))


def wrong_group(case: Case, root: Path, patch) -> Case:
    patch.setattr(trials.os, "access", lambda path, mode: "renderD" not in str(path))
    return tried(case, nodes=trials.read_nodes(root))


def memory_is_short(case: Case, root: Path, patch) -> Case:
    """A device whose memory is the host's, and which has half a gigabyte less than needed."""
    left = iter(range(NEEDED + SYSTEM - 500_000_000, 0, -trials.CHUNK))
    patch.setattr(procfs, "memory_left", lambda: next(left))
    patch.setattr(device, "is_integrated", lambda device: True)
    return tried(case, memory=try_memory(torch.device("meta"), NEEDED))


def no_compiler(case: Case, root: Path, patch) -> Case:
    tools = replace(case.facts.tools, cxx=None, clang=None)
    case = tried(case, compiled_pass=Attempt(0.1, "InvalidCxxCompiler: No working C++ compiler found"))
    return replace(case, run=replace(case.run, device=CPU), facts=replace(case.facts, tools=tools))


def no_ptxas(case: Case, root: Path, patch) -> Case:
    patch.setattr(machine, "util", SimpleNamespace(find_spec=lambda _: None))  # no Triton that comes with one
    (root / "usr/local/cuda/bin/ptxas").unlink()
    case = tried(case, compiled_pass=Attempt(0.1, "RuntimeError: Cannot find ptxas"))
    return replace(case, facts=orin_facts(root))


def slow_clock(case: Case, root: Path, patch) -> Case:
    write(root / "sys/class/devfreq/17000000.gpu/max_freq", "816000000\n")
    return replace(case, jetson=read_jetson(root, ""))


def full_disk(case: Case, root: Path, patch) -> Case:
    patch.setattr(trials.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000 if path == root else None))
    return tried(case, disk_free_bytes=trials.disk_free(case.run.cache))


def unreadable_checkpoint(case: Case, root: Path, patch) -> Case:
    write(root / "model/config.json", "{}")
    write(root / "model/model.safetensors.index.json", '{"weight_map": {"a": "one.safetensors"}}')
    return tried(case, reading=trials.try_reading(str(root / "model"), 2**20))


def no_weights(case: Case, root: Path, patch) -> Case:
    write(root / "model/config.json", "{}")
    return tried(case, reading=trials.try_reading(str(root / "model"), 2**20))


def other_release(case: Case, root: Path, patch) -> Case:
    write(root / "etc/nv_tegra_release", "# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref\n")
    return replace(case, jetson=read_jetson(root, ""))


def unknown_release(case: Case, root: Path, patch) -> Case:
    (root / "etc/nv_tegra_release").unlink()
    return replace(case, jetson=read_jetson(root, ""))


def flex_fails(case: Case, root: Path, patch) -> Case:
    def refuse(*_: object) -> None:
        raise UserError("LlamaForCausalLM: cannot be scored as trees (flex: out of resource: shared memory)")

    patch.setattr(trials, "choose_attention", refuse)
    return tried(case, compiled_pass=trials.try_compiled_pass(replace(case.run, device=CPU, dtype=torch.float32)))


def flex_fails_and_sdpa_will_do(case: Case, root: Path, patch) -> Case:
    case = flex_fails(case, root, patch)
    return replace(case, run=replace(case.run, another_will_do=True))


def no_graph(case: Case, root: Path, patch) -> Case:
    return tried(case, graph=trials.try_graph(CPU))  # no device for CUDA graphs


def slow_disk(case: Case, root: Path, patch) -> Case:
    moments = iter((0.0, 0.5))
    patch.setattr(trials, "perf_counter", lambda: next(moments))
    write(root / "model/model.safetensors", "0" * 2**20)
    reading = trials.try_reading(str(root / "model"), 2**20)
    return tried(case, reading=replace(reading, total_bytes=27_900_000_000))


def full_page_cache(case: Case, root: Path, patch) -> Case:
    write(root / "proc/meminfo", "MemTotal: 31434752 kB\nMemFree: 1048576 kB\nMemAvailable: 29884416 kB\n")
    return tried(case, free_bytes=procfs.read_meminfo(root)["MemFree"])


def failing_allocator(case: Case, root: Path, patch) -> Case:
    return replace(case, facts=orin_facts(root, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"))


Break = Callable[[Case, Path, pytest.MonkeyPatch], Case]
NO_GO: dict[Break, tuple[str, str]] = {  # what the problem and the fix must match
    node_is_missing: (r"/dev/nvmap is missing", r"--runtime nvidia"),
    wrong_group: (r"/dev/dri/renderD128: this user may not read and write", r"--group-add \$\(stat .*usermod -aG"),
    memory_is_short: (r"needs, 0\.\d\d GB cannot be allocated", r"multi-user\.target.*drop_caches.*36\.4\.7 caps"),
    no_compiler: (r"no C\+\+ compiler", r"apt-get install g\+\+, or run uncompiled: --engine eager"),
    no_ptxas: (r"ptxas is missing", r"TRITON_PTXAS_PATH="),
    full_disk: (r"cache: 3 MB of disk are free", r"free 200 MB there, or .*--cache-dir"),
    unreadable_checkpoint: (r"no one\.safetensors, which model\.safetensors\.index\.json names", r"may read all"),
    no_weights: (r"model: has no safetensors files", r"checkpoint"),
    flex_fails: (r"flex attention .*out of resource: shared memory", r"--attention sdpa"),
    no_graph: (r"no CUDA graph can be captured: \w+: ", r"end other programs on cuda:0"),
    failing_allocator: (r"expandable_segments:True: fails", r"unset PYTORCH_CUDA_ALLOC_CONF"),
}
WARNED: dict[Break, tuple[str, str]] = {
    slow_clock: (r"limited to 816 MHz of the module's 931", r"nvpmodel -m 0"),
    other_release: (r"Jetson Linux R35\.4\.1: untested", r"JetPack 6"),
    unknown_release: (r"release of Jetson Linux is not known", r"nv_tegra_release"),
    flex_fails_and_sdpa_will_do: (r"shared memory", r"the run takes sdpa"),
    slow_disk: (r"reads 2 MB a second: loading takes 13304 s", r"NVMe"),
    full_page_cache: (r"26\.93 GB of the memory .* files' pages", r"drop_caches"),
}


def test_a_board_that_is_ready_is_a_go(ready):
    assert judge_case(ready) == ([], [])


@pytest.mark.parametrize("broken", [*NO_GO, *WARNED], ids=lambda broken: broken.__name__)
def test_what_is_broken_is_named_with_what_to_do(broken, ready, orin, monkeypatch):
    """Nothing else is said, and each on one line."""
    no_go, warnings = judge_case(broken(ready, orin, monkeypatch))
    problem, fix = (NO_GO | WARNED)[broken]
    (found,) = no_go if broken in NO_GO else warnings
    assert len(no_go + warnings) == 1
    assert re.search(problem, found.problem)
    assert re.search(fix, found.fix)
    assert "\n" not in line(found)


def test_a_tool_that_is_not_needed_is_not_missed(ready, orin, monkeypatch):
    """The pass was compiled all the same, or nothing is compiled."""
    for done in (Attempt(9.0), None):
        assert judge_case(tried(no_compiler(ready, orin, monkeypatch), compiled_pass=done)) == ([], [])


def test_memory_of_the_host_is_reserved_and_a_share_of_it_touched(monkeypatch):
    wanted = 3 * trials.CHUNK // 2
    assert try_memory(CPU, wanted) == Allocation(wanted, wanted, wanted // trials.TOUCHED)
    monkeypatch.setattr(procfs, "memory_left", lambda: wanted + SYSTEM - 1000)
    assert try_memory(CPU, wanted) == Allocation(wanted, wanted - 1000, 0)


def test_an_allocation_that_fails_is_given_its_reason(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("NvMapMemAllocInternalTagged: 1075072515 error 12")

    monkeypatch.setattr(trials.torch, "empty", fail)
    assert try_memory(CPU, 2**20) == Allocation(2**20, 0, 0, "NvMapMemAllocInternalTagged: 1075072515 error 12")


def test_profiles_are_for_the_modules_that_they_name():
    assert fitting_profile(ORIN_GPU) == "orin-32gb"
    assert fitting_profile(replace(ORIN_GPU, multiprocessors=16)) == "orin-64gb"
    for other in ({"multiprocessors": 8}, {"integrated": False}, {"capability": (11, 0)}):
        assert fitting_profile(replace(ORIN_GPU, **other)) is None
    assert fitting_profile(None) is None


def test_the_last_line_is_the_verdict_with_peak_and_time(ready, orin, monkeypatch):
    def printed(case: Case) -> list[str]:
        console = Console(width=200, file=io.StringIO())
        print_preflight(console, Preflight(case, *judge_case(case), "orin-32gb", {"warm": 90.4, "cold": 141.0}))
        return [row.rstrip() for row in console.file.getvalue().splitlines()]

    peak = "predicted peak 28.00 GB on cuda:0; predicted time 90 s with a warm cache, 141 s without"
    assert printed(ready)[-1] == f"go: {peak} (an estimate for a Jetson AGX Orin 32GB at MAXN)"
    shown = printed(node_is_missing(slow_clock(ready, orin, monkeypatch), orin, monkeypatch))
    assert [row.split(":")[0] for row in shown[-3:]] == ["warning", "no-go", "no-go"]


def test_command(tiny_llama, tmp_path):
    how = ("doctor", "--model", tiny_llama, "--device", "cpu", "--engine", "eager")
    assert re.match(r"go: predicted peak \d+\.\d\d GB on cpu", run_command(*how).splitlines()[-1])
    found = json.loads(run_command(*how, "--json"))["preflight"]
    assert (found["verdict"], found["no_go"], found["profile"]) == ("go", [], None)
    memory = found["trials"]["memory"]
    assert 0 < memory["taken"] == memory["wanted"] < found["predicted_bytes"]
    assert 0 < found["trials"]["reading"]["read_bytes"] == found["trials"]["reading"]["total_bytes"]
    assert "preflight" not in json.loads(run_command("doctor", "--json"))


def test_command_where_nothing_fits(tiny_llama):
    how = ("doctor", "--model", tiny_llama, "--device", "cpu", "--engine", "eager", "--memory-limit", "1MB")
    last = run_command(*how, exit_code=1).splitlines()[-2:]
    assert re.match(r"no-go: .*GB are there on cpu", last[0])
    assert last[1] == "no-go"


@pytest.mark.compiles
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_tiny_pass_compiles_and_leaves_the_caches_as_they_were(attention, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = planned(tmp_path, device=CPU, dtype=torch.float32, attention=attention, head_size=32)
    assert trials.try_compiled_pass(run).problem is None
    assert trials.os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_tried_and_left_as_it_was(tmp_path):
    gpu = torch.device("cuda", 0)
    before = torch.cuda.memory_reserved(gpu)
    assert try_memory(gpu, 3 * trials.CHUNK // 2) == Allocation(*3 * [3 * trials.CHUNK // 2])
    assert trials.try_graph(gpu).problem is None
    assert torch.cuda.max_memory_reserved(gpu) <= before + 2**26
    too_much = try_memory(gpu, torch.cuda.get_device_properties(gpu).total_memory)
    assert too_much.taken < too_much.wanted
    assert "out of memory" in too_much.problem
    assert trials.try_compiled_pass(planned(tmp_path, device=gpu)).problem is None


@pytest.fixture
def shared_memory(orin, monkeypatch) -> Path:
    """Makes the CPU's runs those of a Jetson whose GPU has the host's memory."""
    monkeypatch.setattr(device, "is_integrated", lambda _: True)
    monkeypatch.setattr(procfs, "ROOT", orin)
    return orin


def test_before_loading_a_no_go_is_an_error(shared_memory, tiny_llama):
    (shared_memory / "dev/nvmap").unlink()
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager")
    for run in (lambda: scorer.score(QUESTIONS), lambda: scorer.warm_up(QUESTIONS, 64)):
        with pytest.raises(UserError, match=r"tiny_llama\d*: no-go: /dev/nvmap is missing.*--runtime nvidia"):
            run()
    assert scorer.runtime.weights.model is None
    (shared_memory / "dev/nvmap").touch()
    write(shared_memory / "etc/nv_tegra_release", "# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref\n")
    assert len(scorer.score(QUESTIONS).loglikelihoods[0]) == 2
    assert "Jetson Linux R35.4.1: untested" in scorer.runtime.mode.note


@pytest.mark.compiles
def test_warm_is_refused_before_loading(shared_memory, tiny_llama, tmp_path):
    (shared_memory / "dev/nvmap").unlink()
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu", cache_dir=tmp_path / "code")
    with pytest.raises(UserError, match="no-go: /dev/nvmap is missing"):
        warm(scorer, QUESTIONS)
    assert scorer.runtime.weights.model is None


def test_elsewhere_nothing_is_tried_before_loading(tiny_llama, monkeypatch):
    monkeypatch.setattr(trials, "try_memory", None)
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager")
    assert len(scorer.score(QUESTIONS).loglikelihoods[0]) == 2
