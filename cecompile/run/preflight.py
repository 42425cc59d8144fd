"""The preflight of a run: would this machine run this plan? Asked by `doctor`, and before weights are loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cecompile import device as device_memory
from cecompile import procfs
from cecompile.compile_cache.store import default_directory
from cecompile.doctor.findings import Finding
from cecompile.doctor.machine import Facts, read_devices, read_jetson
from cecompile.doctor.preflight import Case, Preflight, fitting_profile, judge_case, line
from cecompile.doctor.trials import PlannedRun, try_all
from cecompile.errors import UserError
from cecompile.planning.estimate import phase_seconds
from cecompile.planning.planner import largest
from cecompile.planning.profiles import PROFILES
from cecompile.run.runtime import Runtime
from cecompile.workload.plan import Plan
from cecompile.workload.stage import StagedPlan
from cecompile.workload.totals import Totals

Planned = tuple[Runtime, Plan | Totals, int]  # a model, its plan and the number of sequences in the plan


def preflight(planned: Callable[[], Planned], facts: Facts) -> Preflight:
    """Tries the machine for a run; see `doctor.preflight`.

    Args:
        planned: makes the plan that memory holds. Where no plan can be made, the error is the only obstacle.
        facts: of the machine.
    """
    try:
        runtime, plan, sequences = planned()
    except UserError as error:
        return Preflight(None, [Finding(str(error), "")], [])
    gpu = None if runtime.device.type == "cpu" else facts.devices[runtime.device.index or 0]
    run = _planned_run(runtime, plan)
    case = Case(run, try_all(run, facts.jetson is not None), gpu, facts.jetson, facts)
    profile, seconds = fitting_profile(gpu), None
    if profile is not None:
        seconds = _predicted_seconds(profile, runtime, plan, sequences, case.trials.reading.rate)
    return Preflight(case, *judge_case(case), profile, seconds)


def check_before_loading(runtime: Runtime, plan: Plan | StagedPlan) -> None:
    """On a GPU whose memory is the host's, tries what costs little before the weights are loaded.

    Raises:
        UserError: the run would fail; states the obstacles.
    """
    if runtime.weights.model is not None or not device_memory.is_integrated(runtime.device):
        return
    root, run = procfs.ROOT, _planned_run(runtime, plan)
    jetson = read_jetson(root, search_path="")  # without nvpmodel, which takes its time
    devices = read_devices(procfs.read_meminfo(root))
    gpu = devices[runtime.device.index or 0] if devices else None
    no_go, warnings = judge_case(Case(run, try_all(run, jetson is not None, root, quick=True), gpu, jetson))
    if no_go:
        raise UserError(f"{runtime.name}: no-go: {'; '.join(map(line, no_go))}")
    for one in warnings:
        runtime.mode.remark(one.problem)


def _planned_run(runtime: Runtime, plan: Plan | Totals | StagedPlan) -> PlannedRun:
    planner, mode, config = runtime.planner, runtime.mode, runtime.config
    options, text = planner.sizing.options, config.get_text_config()
    if isinstance(plan, StagedPlan):
        needed = planner.sizing.needs.budget(largest(plan), mode.engine, plan.decoding).total
    else:
        needed = planner.budget(plan).total
    cache = Path(options.cache_dir) if options.cache_dir else default_directory()
    return PlannedRun(
        model=runtime.name,
        device=runtime.device,
        dtype=planner.dtype or torch.float32,
        engine=mode.engine,
        attention=mode.attention,
        another_will_do=options.attention == "auto",
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        needed_bytes=needed,
        predicted_bytes=needed + device_memory.used_already(runtime.device),
        cache=cache if mode.engine == "compiled" else None,
    )


def _predicted_seconds(
    name: str, runtime: Runtime, plan: Plan | Totals, sequences: int, rate: float | None
) -> dict[str, float]:
    """Estimated seconds of all phases, with a "warm" and a "cold" cache; `rate` is the disk's, in bytes a second."""
    profile: Any = PROFILES[name]
    profile = replace(profile, storage_rate=min(rate or profile.storage_rate, profile.storage_rate))
    phases = phase_seconds(profile, runtime.planner.sizing.needs.model_sizes(), plan, sequences)
    rest = sum(seconds for phase, seconds in phases.items() if not phase.startswith("warmup"))
    return {state: rest + phases[f"warmup_{state}"] for state in ("warm", "cold")}
