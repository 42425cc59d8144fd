"""`cecompile doctor`: what it reads from a machine, and what it says will go wrong there."""

import io
import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.orin import ORIN_GPU, executable, make_orin, orin_facts, write
from support.runs import run_command, run_process
from support.waiting import HANG

from cecompile.doctor import machine
from cecompile.doctor.findings import GIB, as_json_object, has_kernels, judge, print_doctor
from cecompile.doctor.machine import Device, Facts, find_driver, find_tools, gather, read_cache, read_jetson
from cecompile.procfs import read_meminfo

pytestmark = pytest.mark.process  # tools are asked for their versions
H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132, False, 79 * GIB, 78 * GIB)
STOCK_BUILD = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A tool that is slow on a busy machine is no missing one."""
    monkeypatch.setattr(machine, "PATIENCE", HANG)


@pytest.fixture
def orin(tmp_path) -> Path:
    return make_orin(tmp_path)


def problems(facts: Facts) -> str:
    return "\n".join(finding.problem for finding in judge(facts))


def fixes(facts: Facts) -> str:
    return "\n".join(finding.fix for finding in judge(facts))


def test_orin_is_read(orin):
    jetson = read_jetson(orin, str(orin / "bin"))
    assert (jetson.release, jetson.power_mode) == ("R36.4.7", "MAXN")
    assert (jetson.gpu_clock.highest, jetson.gpu_clock.governor) == (930_750_000, "nvhost_podgov")
    assert jetson.temperatures == {"cpu-thermal": 48.968, "gpu-thermal": 45.218}
    facts = gather(orin, {"PATH": str(orin / "bin")})
    assert (facts.host.cpu, facts.host.total_bytes) == ("NVIDIA Jetson AGX Orin Developer Kit", 30_698 * 2**20)
    assert facts.host.available_bytes == read_meminfo(orin)["MemAvailable"] == 26 * GIB
    assert read_meminfo(orin)["MemFree"] < 26 * GIB  # the page cache is available too
    assert facts.cuda_driver == "/dev/nvgpu/igpu0"


def test_a_healthy_orin_has_no_findings(orin):
    assert judge(orin_facts(orin)) == []


def test_another_machine_is_no_jetson(tmp_path):
    assert read_jetson(tmp_path, "") is None


def test_older_name_of_the_gpu_clock(orin):
    directory = orin / "sys/class/devfreq"
    (directory / "17000000.gpu").rename(directory / "17000000.ga10b")
    assert read_jetson(orin, "").gpu_clock.current == 930_750_000


def test_a_sensor_that_cannot_be_read_is_left_out(orin):
    sensor = orin / "sys/class/thermal/thermal_zone1/temp"
    sensor.unlink()
    sensor.mkdir()
    assert read_jetson(orin, "").temperatures == {"cpu-thermal": 48.968}


def test_power_mode_below_maxn(orin):
    executable(orin / "bin/nvpmodel", "NV Power Mode: MODE_40W\n3")
    facts = orin_facts(orin)
    assert "MODE_40W" in problems(facts)
    assert fixes(facts) == "sudo nvpmodel -m 0"


def test_power_mode_is_not_known_in_a_container(orin):
    (orin / "bin/nvpmodel").unlink()
    assert "power mode is not known" in problems(orin_facts(orin))


def test_clocks_that_are_not_pinned(orin):
    write(orin / "sys/class/devfreq/17000000.gpu/min_freq", "306000000\n")
    assert fixes(orin_facts(orin)) == "sudo jetson_clocks"
    write(orin / "sys/class/devfreq/17000000.gpu/governor", "performance\n")
    assert judge(orin_facts(orin)) == []


def host(facts: Facts, **changes) -> Facts:
    return replace(facts, host=replace(facts.host, **changes))


def gpu(facts: Facts, **changes) -> Facts:
    return replace(facts, devices=(replace(ORIN_GPU, **changes),))


def tools(facts: Facts, **changes) -> Facts:
    return replace(facts, tools=replace(facts.tools, **changes))


CPU_BUILD = {"devices": (), "torch_cuda": None}
WRONG = {  # what is otherwise than on a healthy Orin, and what the problem and the fix must match
    "swap": (lambda f: host(f, swap_bytes=15 * GIB), r"15\.0 GiB of swap cannot hold CUDA memory", ""),
    "little memory free": (lambda f: gpu(f, free_bytes=3 * GIB), r"3\.0 GiB free", ""),
    "little memory of the host": (
        lambda f: replace(host(f, available_bytes=2 * GIB), cuda_driver=None, **CPU_BUILD), r"2\.0 GiB", ""
    ),
    "a CPU build of torch": (lambda f: replace(f, **CPU_BUILD), "CPU build", "CUDA build of torch"),
    "no device": (lambda f: replace(f, devices=()), "", "--runtime nvidia"),
    "no kernels": (lambda f: replace(f, torch_architectures=STOCK_BUILD), r"not for Orin \(sm_87\)", "igpu"),
    "no Triton": (lambda f: replace(f, versions=f.versions | {"triton": None}), "Triton is missing", ""),
    "no ptxas": (lambda f: tools(f, ptxas=None, ptxas_by=None), "ptxas is missing", ""),
    "no compiler": (
        lambda f: tools(f, cxx=None, clang=None), "uncompiled", r"^install g\+\+: sudo apt-get install g\+\+$"
    ),
    "clang alone": (lambda f: tools(f, cxx=None, clang="/usr/bin/clang++ 14.0.0"), "", r"^set CXX=clang\+\+"),
    "no headers of Python": (lambda f: tools(f, python_header=None), r"Python\.h", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_fix(name, orin):
    change, problem, fix = WRONG[name]
    facts = change(orin_facts(orin))
    assert judge(facts) != []
    assert re.search(problem, problems(facts))
    assert re.search(fix, fixes(facts))


def test_another_gpu_has_no_such_findings(orin):
    facts = orin_facts(orin)
    assert judge(gpu(host(facts, swap_bytes=15 * GIB), integrated=False)) == []
    assert judge(replace(facts, torch_architectures=STOCK_BUILD, devices=(H100,), jetson=None)) == []


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    "value", ["expandable_segments:True", "backend:cudaMallocAsync", "x:1,expandable_segments:true"]
)
def test_allocators_that_fail_on_integrated_gpus(orin, name, value):
    facts = orin_facts(orin, **{name: value})
    assert fixes(facts).startswith(f"unset {name}")
    assert judge(gpu(facts, integrated=False)) == []


def test_allocator_options_that_are_harmless(orin):
    harmless = "expandable_segments:False,max_split_size_mb:128"
    assert judge(orin_facts(orin, PYTORCH_ALLOC_CONF=harmless)) == []


def test_driver_version_is_read(tmp_path):
    assert find_driver(tmp_path) is None
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)"
    write(tmp_path / "proc/driver/nvidia/version", line + "\nGCC version:  gcc version 12.2.0\n")
    assert find_driver(tmp_path) == "580.95.05"


@pytest.mark.parametrize(
    ("capability", "integrated", "architectures", "runs"),
    [
        ((8, 9), False, ("sm_80", "sm_86"), True),
        ((8, 0), False, ("sm_86",), False),
        ((9, 0), False, ("sm_80",), False),
        ((9, 0), False, ("compute_80",), True),
        ((8, 0), False, ("compute_90",), False),
        ((8, 7), True, ("sm_80", "sm_86"), False),
        ((8, 7), True, ("sm_87",), True),
        ((9, 0), False, ("sm_90a",), True),
        ((10, 3), False, ("sm_100a",), False),
        ((10, 3), False, ("sm_100f",), True),
        ((12, 0), False, ("compute_100f",), False),
    ],
)
def test_which_builds_run_where(capability, integrated, architectures, runs):
    device = replace(H100, capability=capability, integrated=integrated)
    assert has_kernels(device, architectures) is runs


def test_ptxas_is_found_but_triton_has_to_be_told(orin, monkeypatch):
    monkeypatch.setattr(machine, "util", SimpleNamespace(find_spec=lambda _: None))  # no Triton that comes with one
    ptxas = str(orin / "usr/local/cuda/bin/ptxas")
    untold = find_tools(orin, {"PATH": str(orin / "bin")})
    assert (untold.ptxas, untold.ptxas_by) == (f"{ptxas} 12.6", "toolkit")
    facts = orin_facts(orin)
    assert facts.tools.ptxas_by == "TRITON_PTXAS_PATH"
    assert fixes(replace(facts, tools=untold, environment={})) == f"export TRITON_PTXAS_PATH={ptxas}"
    assert "no such file" in problems(orin_facts(orin, TRITON_PTXAS_PATH="/nowhere/ptxas"))


def test_compiler_is_the_one_torch_looks_for(tmp_path):
    executable(tmp_path / "bin/clang++", "Ubuntu clang version 14.0.0-1ubuntu1.1")
    search = {"PATH": str(tmp_path / "bin")}
    tools = find_tools(tmp_path, search)
    assert (tools.cxx, tools.cxx_wanted) == (None, "g++")
    assert find_tools(tmp_path, search | {"CXX": "clang++"}).cxx == f"{tmp_path / 'bin/clang++'} 14.0.0"


def test_json_and_table_say_the_same(orin):
    facts = replace(orin_facts(orin, HF_HUB_OFFLINE="1"), torch_architectures=STOCK_BUILD)
    findings = judge(facts)
    found = json.loads(json.dumps(as_json_object(facts, findings)))
    assert found["devices"][0]["capability"] == [8, 7]
    assert found["jetson"]["gpu_clock"]["highest"] == 930_750_000
    assert found["findings"] == [{"problem": f.problem, "fix": f.fix} for f in findings]
    console = Console(width=400, file=io.StringIO())
    print_doctor(console, facts, findings)
    shown = console.file.getvalue()
    for word in ("Orin (integrated, sm_87, 14 SMs)", "R36.4.7", "MAXN", "931 MHz", "gpu-thermal 45 °C", "12.6",
                 "HF_HUB_OFFLINE", "11.4.0", findings[0].problem, findings[0].fix):  # fmt: skip
        assert word in shown


def test_command_on_this_machine():
    found = json.loads(run_command("doctor", "--json"))
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["torch_cuda"] == torch.version.cuda
    assert len(found["devices"]) == torch.cuda.device_count()
    assert 0 < found["host"]["available_bytes"] <= found["host"]["total_bytes"]
    assert found["tools"]["python_header"]
    assert metadata.version("torch") in run_command("doctor")


def test_command_where_there_is_no_compiler():
    done = run_process("doctor", PATH="", CXX="")
    assert "no C++ compiler" in done.stdout
    assert "fix: install g++" in done.stdout


def test_cache_is_counted_and_a_fault_in_it_named(tmp_path):
    assert read_cache(tmp_path / "none").entries == 0
    assert not (tmp_path / "none").exists()
    tmp_path.chmod(0o700)
    (tmp_path / f"{'0' * 32}.json").write_text("{")
    facts = replace(gather(), cache=read_cache(tmp_path))
    assert facts.cache.entries == 1
    assert f"compile cache: {'0' * 32}.json is damaged" in problems(facts)
    tmp_path.chmod(0o755)
    facts = replace(gather(), cache=read_cache(tmp_path))
    assert fixes(facts).splitlines()[-1].endswith(f"chmod 700 {tmp_path}")
