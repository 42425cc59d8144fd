"""A language model whose work is packed into passes: the common part of scoring and answering."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from cecompile import demo
from cecompile import device as device_memory
from cecompile.compile_cache.store import CompileCache, NoCacheError, default_directory
from cecompile.errors import UserError
from cecompile.imports import uncollected
from cecompile.model.checkpoint import check_vocabulary, load_config, load_tokenizer
from cecompile.model.structure import on_meta
from cecompile.model.support import refusal
from cecompile.planning.bucket_size import Sizing
from cecompile.planning.options import RunOptions
from cecompile.ranks import ALONE, Ranks
from cecompile.run.context import Progress, RunContext
from cecompile.run.engine_builder import WarmEngine
from cecompile.run.engine_choice import EngineChoice, choose_engine
from cecompile.run.passes import Begun
from cecompile.run.preflight import check_before_loading
from cecompile.run.runtime import Runtime
from cecompile.workload.plan import Plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass, StagedPlan

Model = TypeVar("Model", bound="LanguageModel")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions made ready to run: their sequences and the plan (None for the reference engine)."""

    sequences: Sequences
    plan: Plan | None
    truncated_questions: int = 0


@dataclass(frozen=True, slots=True)
class WarmWorkload:
    """A workload with a warm engine, the passes that the engine has to run, and the passes that have run already."""

    warmed: WarmEngine
    staged: Sequence[StagedPass]
    workload: Workload
    begun: Begun | None


class LanguageModel:
    """A model and its tokenizer, made by `from_pretrained`. Weights are loaded when they are first needed.

    Attributes:
        runtime: the model on its device.
        tokenizer: the model's.
        new_tokens: the most tokens of an answer; 0 where nothing is decoded.
        choice: the choice of the engine by an estimate, once made.
    """

    def __init__(self, runtime: Runtime, tokenizer: Any, new_tokens: int | None = None) -> None:
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.choice: EngineChoice | None = None
        self.new_tokens = new_tokens or 0
        runtime.weights.ties_head = not new_tokens
        if new_tokens and runtime.planner.sizing.needs.streamed is not None:
            raise UserError("--stream-weights: decoding a chat's answer needs all weights in memory")

    @classmethod
    def from_pretrained(
        cls: type[Model], model: str | Path | None = None, *, ranks: Ranks = ALONE, new_tokens: int | None = None,
        **options: Any,
    ) -> Model:  # fmt: skip
        """Makes one for a checkpoint.

        Args:
            model: a directory or hub id of a decoder-only model with safetensors weights; None is the embedded demo.
            ranks: the processes that share the work, this one among them.
            new_tokens: the most tokens of a chat answer.
            options: the fields of `RunOptions`.

        Raises:
            UserError: there is no such model, device or option, or the cache directory is not safe.
        """
        name, chosen = str(demo.MODEL if model is None else model), RunOptions(**options)
        device = resolve_device(chosen.device, ranks)
        config, tokenizer = load_config(name), load_tokenizer(name)
        own_device = device.type == "cuda" and chosen.device in ("auto", "cuda")
        sizing = Sizing(name, config, device, chosen, ranks, 1 if own_device else ranks.local_size)
        runtime = _runtime(name, config, device, sizing, ranks)
        return cls(runtime, tokenizer, new_tokens)

    @classmethod
    def from_model(
        cls: type[Model], model: PreTrainedModel, tokenizer: Any, *, name: str = "model",
        new_tokens: int | None = None, **options: Any,
    ) -> Model:  # fmt: skip
        """Makes one for a model that is loaded already. The model keeps our attention and compiled layers.

        Args:
            model: a stock causal model in evaluation mode, on one device.
            tokenizer: the model's.
            name: for messages and results.
            new_tokens: the most tokens of a chat answer.
            options: `engine`, `attention`, `tokens_per_bucket`, `memory_limit`, `cache_dir` and `require_warm` of
                `RunOptions`.

        Raises:
            UserError: there is no such option, or the cache directory is not safe.
        """
        dtype = str(model.dtype).removeprefix("torch.")
        chosen = RunOptions(str(model.device), dtype, pipeline=1, stream_weights=False, target_device=None, **options)
        sizing = Sizing(name, model.config, model.device, chosen)
        runtime = _runtime(name, model.config, model.device, sizing, ALONE)
        runtime.weights.adopt(model)
        return cls(runtime, tokenizer, new_tokens)

    def prepare(self, questions: Sequence[Any], *, fit: bool = False) -> Workload:
        """Encodes the questions and makes the plan. Loads no weights.

        Args:
            questions: at least one.
            fit: compare the plan with the free memory.

        Raises:
            UserError: a question cannot be encoded for this model, or nothing fits.
        """
        raise NotImplementedError

    def workload(self, sequences: Sequences, fit: bool, truncated_questions: int = 0) -> Workload:
        """Plans a workload of these sequences. Raises UserError: a token is not the model's, or see `Planner.plan`."""
        runtime = self.runtime
        check_vocabulary(runtime.name, self.tokenizer, runtime.config, int(sequences.token_ids.max()))
        plan = None if runtime.mode.engine == "reference" else runtime.planner.plan(sequences, fit, self.new_tokens)
        return Workload(sequences, plan, truncated_questions)

    def warm_up(self, questions: Sequence[Any], longest: int, *, progress: Progress = lambda *_: None) -> None:
        """Loads the model and warms up for data not yet seen, so that later calls compile nothing.

        Args:
            questions: a few, on which the warm engine is checked.
            longest: tokens of the longest input to come; for chat questions, of the longest prompt. A longer input has
                a warm-up of its own.
            progress: called as (phase, done, total).

        Raises:
            UserError, CheckError: see `Runtime`.
        """
        if self.runtime.mode.engine == "reference":
            self.runtime.load()
            return
        self.runtime.planner.plan_ahead(longest, longest + self.new_tokens if self.new_tokens else 0)
        self.warm(self.prepare(questions, fit=True), RunContext(progress=progress))

    def in_context(self, run: RunContext | None) -> RunContext:
        """The context of a run of this model, with this model's ranks."""
        return replace(run or RunContext(), ranks=self.runtime.ranks)

    def warm(self, workload: Workload, run: RunContext) -> WarmWorkload:
        """Loads the model and warms up for a workload that has a plan; returns the workload as planned in the end.

        The time of passes that have run already is booked as inference.

        Raises:
            UserError, CheckError: see `Runtime`.
        """
        assert workload.plan is not None
        clock = run.clock
        clock.enter("warmup")
        if self.choice is None and self.runtime.warmup.warmed is None:
            self.choice = choose_engine(self.runtime, workload.plan, run.journal)
            if self.choice is not None and self.choice.engine == "eager":
                self.runtime.mode.engine = "eager"
                workload = self._planned_again(workload)
        assert workload.plan is not None
        check_before_loading(self.runtime, workload.plan)
        warmup = self.runtime.warmup
        warmup.look_up(workload.plan)
        while warmup.lacks(workload.plan) and warmup.compile_apart(
            StagedPlan.for_plan(workload.plan, workload.sequences), run.progress
        ):
            workload = self._planned_again(workload)
        clock.enter("load_model")
        self.runtime.load(workload.plan, clock)
        clock.enter("warmup")
        plan_again = self.runtime.warmup.probe()
        while True:
            clock.enter("preprocess")
            if plan_again:
                workload = self._planned_again(workload)
            assert workload.plan is not None
            ready = StagedPlan.for_plan(workload.plan, workload.sequences)
            clock.enter("warmup")
            warmed = self.runtime.warmup.engine_for(ready, run.progress)
            if warmed is not None:
                begun, warmed.begun = warmed.begun, None
                if begun is not None and (self.runtime.ranks.size > 1 or not begun.among(ready.staged)):
                    begun = None
                if begun is not None:
                    clock.enter("inference", begun.began)
                    clock.enter("warmup", begun.ended)
                return WarmWorkload(warmed, ready.staged, workload, begun)
            plan_again = True  # memory ran out

    def _planned_again(self, workload: Workload) -> Workload:
        return replace(workload, plan=self.runtime.planner.plan(workload.sequences, True, self.new_tokens))


def timed(
    infer: Callable[[RunContext, Begun | None], Outcome], run: RunContext, begun: Begun | None
) -> tuple[Outcome, list[float]]:
    """Returns the outcome of the first of `run.repeat` runs, and each run's seconds.

    Only the first is journaled, and goes on with what has begun.
    """
    firsts: list[Outcome] = []
    seconds: list[float] = []
    for i in range(run.repeat):
        run.ranks.barrier()
        began = perf_counter()
        outcome = infer(run, begun) if i == 0 else infer(replace(run, journal=None), None)
        before = begun.seconds if begun is not None and i == 0 else 0.0
        seconds.append(before + perf_counter() - began)
        firsts = firsts or [outcome]  # all others are let go
    return firsts[0], seconds


def _runtime(name: str, config: Any, device: torch.device, sizing: Sizing, ranks: Ranks) -> Runtime:
    options = sizing.options
    if options.engine == "compiled" or (options.engine == "auto" and device.type == "cuda"):
        with suppress(ImportError), uncollected():  # an error is reported when something is compiled
            importlib.import_module("torch._inductor.compile_fx")  # takes seconds; the checkpoint is read meanwhile
    reason = None if options.engine == "reference" else refusal(on_meta(config))
    if reason:
        refused = f"{config.model_type} models cannot be run as trees: {reason}"
        raise UserError(f"{name}: {refused}; --engine reference runs them")
    if sizing.room.limit is not None:
        device_memory.enforce(device, sizing.room.limit)
    cache, note = None, None
    if options.engine in ("auto", "compiled"):
        try:
            cache = CompileCache(Path(options.cache_dir) if options.cache_dir else default_directory())
        except NoCacheError as error:
            if options.cache_dir or options.require_warm:
                raise
            note = f"compiled without a cache: {error}"
    runtime = Runtime(name, config, device, sizing, cache, ranks)
    runtime.mode.remark(note)
    return runtime


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Returns the named device and makes it torch's current device; "auto" is a CUDA device, else the CPU.

    A CUDA device without a number is the first, and where several ranks share a machine, each one's own.

    Raises:
        UserError: no such device, or fewer than ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.size > 1:
        count = torch.cuda.device_count()
        if 0 < count < ranks.local_size:
            found = f"{ranks.local_size} ranks on this machine, {count} CUDA devices"
            raise UserError(f"--device {name}: {found}; --device cuda:0 puts all ranks on one")
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise UserError(f"--device {name}: this machine's torch {torch.__version__} sees {count} CUDA devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device
