"""Judges a planned run by the trials of this machine: go or no-go, each obstacle with its fix."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cecompile import device as device_memory
from cecompile.doctor.findings import Finding, Pairs, check_allocator, check_compiler, check_triton
from cecompile.doctor.machine import Device, Facts, Jetson
from cecompile.doctor.trials import Attempt, PlannedRun, Trials
from cecompile.errors import printable
from cecompile.planning.profiles import PROFILES

KNOWN_RELEASE = "R36."  # Jetson Linux of JetPack 6, which the image is built for
LITTLE_DISK = 200_000_000  # bytes: a model's compiled code takes some ten megabytes, and is written beside the old
SLOW_DISK, LONG = 0.5e9, 20.0  # bytes a second, and seconds of loading from which a slow disk is worth a word
SAME_CLOCK = 0.99  # a smaller share of the module's highest clock is a lower clock
EAGER = "or run uncompiled: --engine eager"
# Modules by their number of multiprocessors: the profile, and the GPU's highest clock in Hz, at MAXN.
ORIN_MODULES = {14: ("orin-32gb", 930.75e6), 16: ("orin-64gb", 1.3e9)}


@dataclass(frozen=True, slots=True)
class Case:
    """All that the checks look at.

    Attributes:
        gpu: the GPU that runs; None on a CPU.
        jetson: None on other machines.
        facts: of the machine; None leaves out the checks of compilers and settings.
    """

    run: PlannedRun
    trials: Trials
    gpu: Device | None
    jetson: Jetson | None
    facts: Facts | None = None


@dataclass(frozen=True, slots=True)
class Preflight:
    """The outcome.

    Attributes:
        case: None where not even a plan could be made.
        no_go: obstacles that stop the run, or make the run another one than planned.
        warnings: faults that slow a run down, or may stop the run.
        profile: the device of PROFILES that `predicted_s` is for; None where no profile fits.
        predicted_s: estimated seconds of the run from start to end, with a warm and with a cold cache.
    """

    case: Case | None
    no_go: list[Finding]
    warnings: list[Finding]
    profile: str | None = None
    predicted_s: dict[str, float] | None = None

    @property
    def verdict(self) -> str:
        """The word "go" or "no-go"."""
        return "no-go" if self.no_go else "go"


def judge_case(case: Case) -> tuple[list[Finding], list[Finding]]:
    """The obstacles that stop a run, and the warnings."""
    no_go, warnings = ([Finding(*pair) for check in checks for pair in check(case)] for checks in (STOPS, WARNINGS))
    return no_go, warnings


def fitting_profile(gpu: Device | None) -> str | None:
    """The name in PROFILES of an Orin module; None for any other device."""
    module = None if gpu is None or not gpu.integrated else ORIN_MODULES.get(gpu.multiprocessors)
    return module[0] if module and gpu is not None and gpu.capability == (8, 7) else None


def line(finding: Finding) -> str:
    """A finding on one line."""
    return printable(f"{finding.problem}; {finding.fix}" if finding.fix else finding.problem)


def _check_nodes(case: Case) -> Pairs:
    for node in case.trials.nodes:
        if not node.there:
            fix = "start the container with --runtime nvidia; outside of one, the driver is not loaded: reboot"
            yield f"{node.path} is missing, through which a Jetson's GPU gets its memory", fix
        elif not node.usable:
            fix = f"docker run --group-add $(stat -c %g {node.path}), outside of a container: sudo usermod -aG"
            yield f"{node.path}: this user may not read and write it (group {node.group})", f"{fix} {node.group} $USER"


def _check_checkpoint(case: Case) -> Pairs:
    if case.trials.reading.problem is not None:
        yield case.trials.reading.problem, "mount or copy the checkpoint so that this user may read all of its files"


def _check_memory(case: Case) -> Pairs:
    memory, jetson = case.trials.memory, case.jetson
    if memory.taken >= memory.wanted:
        return
    reason = f" ({memory.problem})" if memory.problem else ""
    got = f"of the {_gb(memory.wanted)} that the run needs, {_gb(memory.wanted - memory.taken)} cannot be allocated"
    fix = "close other programs"
    if device_memory.is_integrated(case.run.device):
        fix += ", leave the desktop (sudo systemctl isolate multi-user.target), drop the page cache (sync; echo 3 |"
        fix += " sudo tee /proc/sys/vm/drop_caches)"
    if jetson is not None and (jetson.release or "").startswith("R36.4.7"):
        fix += "; Jetson Linux 36.4.7 caps allocations on some boards: take another release"
    yield f"{case.run.device}: {got}{reason}", fix


def _check_tools(case: Case) -> Pairs:
    """Gives the cause where the compiled pass failed; where that pass compiled, no tool is missing."""
    tried = case.trials.compiled_pass
    if case.facts is None or tried is None or tried.problem is None:
        return
    check = check_compiler if case.run.device.type == "cpu" else check_triton
    for problem, fix in check(case.facts):
        yield problem, f"{fix}, {EAGER}"


def _check_allocator(case: Case) -> Pairs:
    if case.facts is not None and case.run.device.type == "cuda":
        yield from check_allocator(case.facts)


def _check_disk_space(case: Case) -> Pairs:
    free = case.trials.disk_free_bytes
    if free is not None and free < LITTLE_DISK:
        fix = f"free {LITTLE_DISK / 1e6:.0f} MB there, or name another directory: --cache-dir"
        yield f"{case.run.cache}: {free / 1e6:.0f} MB of disk are free: compiled code cannot be kept", fix


def _check_compiled_pass(case: Case) -> Pairs:
    yield from () if _falls_back(case) else _pass_problem(case, f"try --attention sdpa, {EAGER}")


def _warn_of_another_attention(case: Case) -> Pairs:
    if _falls_back(case):
        yield from _pass_problem(case, "the run takes sdpa, slower and with more memory: plan with --attention sdpa")


def _falls_back(case: Case) -> bool:
    return case.run.attention == "flex" and case.run.another_will_do


def _pass_problem(case: Case, fix: str) -> Pairs:
    tried = case.trials.compiled_pass
    if tried is not None and tried.problem is not None and not list(_check_tools(case)):
        yield f"a tiny pass with {case.run.attention} attention does not compile or is wrong: {tried.problem}", fix


def _check_graph(case: Case) -> Pairs:
    tried = case.trials.graph
    if tried is not None and tried.problem is not None:
        fix = f"end other programs on {case.run.device} and try again, {EAGER}"
        yield f"no CUDA graph can be captured: {tried.problem}", fix


def _warn_of_clocks(case: Case) -> Pairs:
    clock = None if case.jetson is None else case.jetson.gpu_clock
    profile = fitting_profile(case.gpu)
    if clock is None or clock.highest is None or profile is None or case.gpu is None:
        return
    highest = ORIN_MODULES[case.gpu.multiprocessors][1]
    if clock.highest < SAME_CLOCK * highest:
        slower = f"the GPU's clock is limited to {clock.highest / 1e6:.0f} MHz of the module's {highest / 1e6:.0f}"
        yield f"{slower}: slower, and times are not comparable", "on the Jetson itself: sudo nvpmodel -m 0"


def _warn_of_release(case: Case) -> Pairs:
    if case.jetson is None:
        return
    release = case.jetson.release
    if release is None:
        fix = "on the Jetson itself: cat /etc/nv_tegra_release should say R36"
        yield "the release of Jetson Linux is not known: another than R36 may lack what the image needs", fix
    elif not release.startswith(KNOWN_RELEASE):
        fix = "take JetPack 6, or build the image on a base for this release: --build-arg BASE_IMAGE"
        yield f"Jetson Linux {release}: untested; the image is for R36 (JetPack 6)", fix


def _warn_of_page_cache(case: Case) -> Pairs:
    free = case.trials.free_bytes
    if case.jetson is not None and free is not None and free < case.run.needed_bytes:
        missing = _gb(case.run.needed_bytes - free)
        fix = "drop the page cache on the Jetson itself: sync; echo 3 | sudo tee /proc/sys/vm/drop_caches"
        yield f"{missing} of the memory that the run needs hold files' pages: allocating may fail (NvMap error 12)", fix


def _warn_of_disk(case: Case) -> Pairs:
    reading = case.trials.reading
    if reading.rate is not None and reading.rate < SLOW_DISK and (wait := reading.total_bytes / reading.rate) > LONG:
        rate = f"the disk reads {reading.rate / 1e6:.0f} MB a second"
        yield f"{rate}: loading takes {wait:.0f} s", "keep the checkpoint on an NVMe disk"


Check = Callable[[Case], Pairs]
STOPS: tuple[Check, ...] = (
    _check_nodes, _check_checkpoint, _check_memory, _check_allocator, _check_tools, _check_graph, _check_compiled_pass,
    _check_disk_space,
)  # fmt: skip
WARNINGS: tuple[Check, ...] = (
    _warn_of_another_attention, _warn_of_clocks, _warn_of_release, _warn_of_page_cache, _warn_of_disk,
)  # fmt: skip


def preflight_json(preflight: Preflight) -> dict[str, Any]:
    """`doctor --json`'s `preflight`. Memory in bytes."""
    case, findings = preflight.case, {"no_go": preflight.no_go, "warnings": preflight.warnings}
    return {
        "verdict": preflight.verdict,
        **{name: [dataclasses.asdict(one) for one in some] for name, some in findings.items()},
        "predicted_bytes": None if case is None else case.run.predicted_bytes,
        "predicted_s": preflight.predicted_s,
        "profile": preflight.profile,
        "trials": None if case is None else dataclasses.asdict(case.trials),
    }


def print_preflight(console: Console, preflight: Preflight) -> None:
    """Prints the trials as a table, then a line for each finding; the last line is the verdict."""
    case, predicted = preflight.case, ""
    if case is not None:
        table = Table(Column(style="bold"), Column(), show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in _rows(case):
            table.add_row(name, Text(printable(value)))
        console.print(table)
        predicted = f": predicted peak {_gb(case.run.predicted_bytes)} on {case.run.device}; {_time(preflight)}"
    for word, findings in (("warning", preflight.warnings), ("no-go", preflight.no_go)):
        for finding in findings:
            console.print(Text(f"{word}: {line(finding)}"), soft_wrap=True)
    console.print(Text(f"{preflight.verdict}{predicted}"), soft_wrap=True)


def _time(preflight: Preflight) -> str:
    if preflight.predicted_s is None or preflight.profile is None:
        return "no time predicted: no profile fits this device"
    warm, cold = preflight.predicted_s["warm"], preflight.predicted_s["cold"]
    title = PROFILES[preflight.profile].title
    return f"predicted time {warm:.0f} s with a warm cache, {cold:.0f} s without (an estimate for a {title})"


def _rows(case: Case) -> Iterator[tuple[str, str]]:
    run, trials = case.run, case.trials
    memory, reading = trials.memory, trials.reading
    usable = sum(node.usable for node in trials.nodes)
    yield "device nodes", f"{usable} of {len(trials.nodes)} usable" if trials.nodes else "left out: no Jetson"
    place = "allocated and freed" if run.device.type == "cuda" else f"reserved, {_gb(memory.touched)} of it touched,"
    yield "memory", f"{_gb(memory.taken)} of {_gb(memory.wanted)} {place} on {run.device}"
    if reading.rate is None:
        yield "disk", "not measured"
    else:
        load = f"all {_gb(reading.total_bytes)} in about {reading.total_bytes / reading.rate:.1f} s"
        yield "disk", f"{reading.rate / 1e6:.0f} MB a second past the page cache: {load}"
    if trials.disk_free_bytes is not None:
        yield "cache", f"{_gb(trials.disk_free_bytes)} of disk free for {run.cache}"
    yield "CUDA graph", _outcome(trials.graph, "captured", "left out: CUDA and --engine compiled alone have graphs")
    done = f"tiny, with {run.attention} attention, compiled and compared"
    yield "compiled pass", _outcome(trials.compiled_pass, done, f"left out: --engine {run.engine}")


def _outcome(tried: Attempt | None, done: str, left_out: str) -> str:
    if tried is None:
        return left_out
    return f"{done if tried.problem is None else 'failed'}, {tried.seconds:.1f} s"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
