"""Compiling in a process of its own, before the weights are loaded.

The compiler takes a gigabyte or two. Where the GPU's memory is the host's, a large model leaves no room for that. The
process here compiles for a sample of the model (see `model.sample`), writes the compile cache, and ends. So the
compiler's memory and the weights are never there together.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cecompile.compile_cache.store import CompileCache
from cecompile.engine import initialise
from cecompile.engine.attention import attention_before
from cecompile.engine.probe import choose_attention
from cecompile.errors import UserError, first_line, printable
from cecompile.model.sample import sample_model
from cecompile.planning.planner import Planner
from cecompile.run.engine_builder import EngineBuilder
from cecompile.workload.stage import StagedPlan

WORKERS = 8  # processes that compile kernels, at most


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that the process needs.

    Attributes:
        config: the model's configuration.
        dtype: in which the model runs.
        device: that runs.
        attention: wanted, "auto", "flex" or "sdpa".
        planned: the attention that `ready` is planned for.
        readout_chunk: see `Engine`.
        cache: the cache's directory.
        facts: give the cache's key.
        ready: the plan to compile for.
    """

    config: Any
    dtype: torch.dtype
    device: torch.device
    attention: str
    planned: str
    readout_chunk: int
    cache: Path
    facts: dict[str, Any]
    ready: StagedPlan


@dataclass(frozen=True, slots=True)
class Outcome:
    """The attention that computes the model exactly, and the reason where nothing, or not that, was compiled."""

    attention: str
    reason: str | None = None


def job_for(
    ready: StagedPlan, planner: Planner, planned: str, device: torch.device, cache: Path, facts: dict[str, Any]
) -> Job:
    """The job of compiling for a plan, with the passes that the check of the compiled code needs: one of each bucket.

    The dtype that the planner's model runs in must be known.
    """
    assert planner.dtype is not None
    options, chunk = planner.sizing.options, planner.sizing.tuning.readout_chunk
    firsts = {one.bucket: one for one in reversed(ready.staged)}
    staged = [firsts[bucket] for bucket in sorted(firsts)]
    return Job(
        planner.config, planner.dtype, device, options.attention, planned, chunk, cache, facts,
        replace(ready, staged=staged),
    )  # fmt: skip


def compile_apart(job: Job, done: Callable[[], None]) -> Outcome:
    """Starts the process and waits for its end.

    Args:
        done: called after each fixed shape.

    Returns:
        The outcome. With another attention than the planned one, nothing was compiled.
    """
    environment = {initialise.WORKERS: str(min(WORKERS, os.cpu_count() or 1))} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "cecompile.run.compile_apart"]
    last = ""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
        pickle.dump(job, given)
        given.seek(0)
        with subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    last = line
                    if line == "\n":
                        done()
            except BaseException:
                process.kill()
                raise
        if process.returncode == 0:
            return Outcome(**json.loads(last))
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    ended = f"ended by signal {-process.returncode}" if process.returncode < 0 else (said or ["no reason given"])[-1]
    return Outcome(job.planned, printable(ended, 200))


def _compile(job: Job, done: Callable[[Any], None]) -> Outcome:
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
    entry = CompileCache(job.cache).open(job.facts)
    initialise.begin(job.device).join()
    model = sample_model(job.config, job.dtype, job.device)
    attention, reason = choose_attention(model, job.attention)
    if attention != job.planned:
        return Outcome(attention, reason)
    builder = EngineBuilder(model, attention_before(model), attention, job.readout_chunk, entry)
    return Outcome(attention, builder.warm("compiled", job.ready, done).note)


def main() -> None:
    """Reads a pickled Job; writes an empty line after each fixed shape, then the Outcome as JSON, to stdout."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever a library prints is no part of the outcome

        def done(_: object) -> None:
            print(file=out, flush=True)

        job: Job = pickle.load(sys.stdin.buffer)
        try:
            outcome = _compile(job, done)
        except UserError as error:
            outcome = Outcome(job.planned, first_line(error))
        print(json.dumps(asdict(outcome)), file=out)


if __name__ == "__main__":
    main()
