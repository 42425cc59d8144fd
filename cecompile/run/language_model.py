"""A model whose work is packed into passes: what scoring and answering have in common."""

from collections.abc import Callable, Sequence
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
from cecompile.model.checkpoint import DTYPES, check_vocabulary, load_config, load_tokenizer
from cecompile.model.structure import on_meta
from cecompile.model.support import refusal
from cecompile.planning import memory
from cecompile.planning.bucket_size import Sizing
from cecompile.ranks import ALONE, Ranks
from cecompile.results.clock import Clock
from cecompile.results.journal import Journal
from cecompile.run.engine_builder import WarmEngine
from cecompile.run.progress import Progress
from cecompile.run.runtime import Runtime
from cecompile.workload.plan import BLOCK, Plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass, StagedPlan

ENGINES = ("compiled", "eager", "reference")
ATTENTIONS = ("auto", "flex", "sdpa")

Model = TypeVar("Model", bound="LanguageModel")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions made ready to run: their sequences and the plan (None for the reference engine)."""

    sequences: Sequences
    plan: Plan | None
    truncated_questions: int = 0


class LanguageModel:
    """A model and its tokenizer, made by `from_pretrained`. Weights are loaded when they are first needed.

    Attributes:
        runtime: the model on its device.
        tokenizer: the model's.
        new_tokens: the most tokens of an answer; 0 where nothing is decoded.
    """

    def __init__(self, runtime: Runtime, tokenizer: Any, new_tokens: int = 0) -> None:
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.new_tokens = new_tokens
        if new_tokens and runtime.planner.sizing.streamed is not None:
            raise UserError("--stream-weights: decoding a chat's answer needs all weights in memory")

    @classmethod
    def from_pretrained(
        cls: type[Model],
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "compiled",
        attention: str = "auto",
        tokens_per_bucket: int | None = None,
        memory_limit: int | None = None,
        cache_dir: str | Path | None = None,
        require_warm: bool = False,
        ranks: Ranks = ALONE,
        pipeline: int = 1,
        stream_weights: bool = False,
        target_device: memory.TargetDevice | None = None,
        **own: Any,
    ) -> Model:
        """One for a checkpoint.

        Args:
            model: a directory or hub id of a decoder-only model with safetensors weights; None is the embedded demo.
            device: "auto", "cpu", "cuda" or "cuda:N"; without a number each rank of a machine takes its own.
            dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
            engine: "compiled", "eager" (the same pass uncompiled) or "reference" (the stock model, one by one).
            attention: "auto", "flex" or "sdpa"; "auto" picks by device and by a probe.
            tokens_per_bucket: token slots of a pass; None picks by device and memory.
            memory_limit: bytes the run may take, of the device's memory; None is what there is.
            cache_dir: of compiled code; None is CECOMPILE_CACHE, else the user's cache directory.
            require_warm: refuse to compile what is not in the cache.
            ranks: the processes that share the work, this one among them.
            pipeline: stages that the layers are divided among, each a rank.
            stream_weights: read the layers' weights anew for each sweep of passes; memory holds two layers.
            target_device: a device to plan for in place of `device`; what is planned is not run.
            own: what the class itself takes.

        Raises:
            UserError: there is no such model, device or option, or the cache directory is not safe.
        """
        path = str(demo.MODEL if model is None else model)
        options = {"engine": engine, "attention": attention, "dtype": dtype}
        _check(tokens_per_bucket, **options)
        if pipeline > 1 and engine == "reference":
            raise UserError("--pipeline: the reference engine runs the whole model")
        if stream_weights and engine == "reference":
            raise UserError("--stream-weights: --engine reference needs all weights in memory")
        if stream_weights and pipeline > 1:
            raise UserError("--stream-weights: does not go with --pipeline, whose stages hold their weights")
        resolved = resolve_device(device, ranks)
        config, tokenizer = load_config(path), load_tokenizer(path)
        sharers = 1 if resolved.type == "cuda" and device in ("auto", "cuda") else ranks.local_size
        sizing = Sizing(
            path, config, resolved, dtype, tokens_per_bucket, memory_limit, ranks, sharers, pipeline, stream_weights,
            target_device,
        )  # fmt: skip
        runtime = _runtime(path, config, resolved, sizing, cache_dir, require_warm, ranks, **options)
        return cls(runtime, tokenizer, **own)

    @classmethod
    def from_model(
        cls: type[Model],
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        name: str = "model",
        engine: str = "compiled",
        attention: str = "auto",
        tokens_per_bucket: int | None = None,
        memory_limit: int | None = None,
        cache_dir: str | Path | None = None,
        require_warm: bool = False,
        **own: Any,
    ) -> Model:
        """One for a model that is loaded already. From the first use on it has our attention, and compiled layers.

        Args:
            model: a stock causal model in evaluation mode, on one device.
            tokenizer: the model's.
            name: for messages and results.
            engine, attention, tokens_per_bucket, memory_limit, cache_dir, require_warm, own: see `from_pretrained`.

        Raises:
            UserError: there is no such option, or the cache directory is not safe.
        """
        dtype = str(model.dtype).removeprefix("torch.")
        options = {"engine": engine, "attention": attention, "dtype": dtype}
        _check(tokens_per_bucket, **options)
        sizing = Sizing(name, model.config, model.device, dtype, tokens_per_bucket, memory_limit)
        runtime = _runtime(name, model.config, model.device, sizing, cache_dir, require_warm, ALONE, **options)
        runtime.weights.adopt(model)
        return cls(runtime, tokenizer, **own)

    def prepare(self, questions: Sequence[Any], *, fit: bool = False) -> Workload:
        """Encodes the questions and makes the plan. Loads no weights.

        Args:
            questions: at least one.
            fit: hold the plan against the memory there is.

        Raises:
            UserError: a question cannot be encoded for this model, or nothing fits.
        """
        raise NotImplementedError

    def workload(self, sequences: Sequences, fit: bool, truncated_questions: int = 0) -> Workload:
        """These sequences, ready to run. Raises UserError: they are not this model's, or see `Planner.plan`."""
        runtime = self.runtime
        check_vocabulary(runtime.name, self.tokenizer, runtime.config, int(sequences.token_ids.max()))
        plan = None if runtime.mode.engine == "reference" else runtime.planner.plan(sequences, fit, self.new_tokens)
        return Workload(sequences, plan, truncated_questions)

    def warm_up(self, questions: Sequence[Any], longest: int, *, progress: Progress = lambda *_: None) -> None:
        """Loads the model and warms up for data not yet seen: later calls find all that they need warm.

        Args:
            questions: a few, on which the warm engine is checked.
            longest: tokens of the longest input to come; of chat questions, of the longest prompt. A longer one is
                warmed up for when it comes.
            progress: called as (phase, done, total).

        Raises:
            UserError, CheckError: see `Runtime`.
        """
        if self.runtime.mode.engine == "reference":
            self.runtime.load()
            return
        self.runtime.planner.plan_ahead(longest, longest + self.new_tokens if self.new_tokens else 0)
        self.warm(self.prepare(questions, fit=True), Clock(), progress)

    def warm(
        self, workload: Workload, clock: Clock, progress: Progress
    ) -> tuple[WarmEngine, Sequence[StagedPass], Workload]:
        """Loads the model and warms up for a workload that has a plan.

        Returns:
            The warm engine, the passes it has to run, and the workload as it is planned in the end.

        Raises:
            UserError, CheckError: see `Runtime`.
        """
        assert workload.plan is not None
        clock.enter("warmup")
        self.runtime.warmup.look_up(workload.plan)
        clock.enter("load_model")
        self.runtime.load(workload.plan, clock)
        clock.enter("warmup")
        plan_again = self.runtime.warmup.probe()
        while True:
            clock.enter("preprocess")
            if plan_again:
                plan = self.runtime.planner.plan(workload.sequences, True, self.new_tokens)
                workload = replace(workload, plan=plan)
            assert workload.plan is not None
            ready = StagedPlan.for_plan(workload.plan, workload.sequences)
            clock.enter("warmup")
            warmed = self.runtime.warmup.engine_for(ready, progress)
            if warmed is not None:
                return warmed, ready.staged, workload
            plan_again = True  # memory ran out


def timed(
    run: Callable[[Journal | None], Outcome], repeat: int, journal: Journal | None, ranks: Ranks
) -> tuple[Outcome, list[float]]:
    """The outcome of the first of `repeat` runs, which alone is journaled, and the seconds of each run."""
    outcomes, seconds = [], []
    for i in range(repeat):
        ranks.barrier()
        began = perf_counter()
        outcomes.append(run(journal if i == 0 else None))
        seconds.append(perf_counter() - began)
    return outcomes[0], seconds


def _check(tokens_per_bucket: int | None, engine: str, attention: str, dtype: str) -> None:
    checks = ((engine, ENGINES, "engine"), (attention, ATTENTIONS, "attention"), (dtype, ("auto", *DTYPES), "dtype"))
    for value, known, option in checks:
        if value not in known:
            raise UserError(f"{option} '{value}': one of {', '.join(known)}")
    if tokens_per_bucket is not None and tokens_per_bucket < BLOCK:
        raise UserError(f"tokens per bucket: {tokens_per_bucket} is too few, at least {BLOCK}")


def _runtime(
    name: str, config: Any, device: torch.device, sizing: Sizing, cache_dir: str | Path | None, require_warm: bool,
    ranks: Ranks, *, engine: str, attention: str, dtype: str,
) -> Runtime:  # fmt: skip
    reason = None if engine == "reference" else refusal(on_meta(config))
    if reason:
        raise UserError(
            f"{name}: {config.model_type} models cannot be run as trees: {reason}; --engine reference runs them"
        )
    if sizing.limit is not None:
        device_memory.enforce(device, sizing.limit)
    cache, note = None, None
    if engine == "compiled":
        try:
            cache = CompileCache(Path(cache_dir) if cache_dir else default_directory())
        except NoCacheError as error:
            if cache_dir or require_warm:
                raise
            note = f"compiled without a cache: {error}"
    runtime = Runtime(name, config, device, dtype, engine, attention, sizing, cache, require_warm, ranks)
    if note:
        runtime.mode.remark(note)
    return runtime


def resolve_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of that name, made torch's current one; "auto" is a CUDA device, else the CPU.

    A CUDA device without a number is the first, and where several ranks share a machine, each one's own.

    Raises:
        UserError: no such device, or fewer than ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.size > 1:
        count = torch.cuda.device_count()
        if 0 < count < ranks.local_size:
            raise UserError(
                f"--device {name}: {ranks.local_size} ranks on this machine, {count} CUDA devices; "
                "--device cuda:0 puts all ranks on one"
            )
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise UserError(f"--device {name}: this machine's torch {torch.__version__} sees {count} CUDA devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device
