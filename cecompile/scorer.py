"""The scorer: a model and the way it runs, from questions to loglikelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cecompile import demo
from cecompile.engine import memory
from cecompile.engine.cache import CompileCache, NoCacheError, default_directory
from cecompile.engine.forward import Readouts
from cecompile.engine.model import DTYPES, check_vocabulary, load_config, load_tokenizer, resolve_device
from cecompile.engine.reference import score_one_by_one
from cecompile.errors import CheckError, UserError
from cecompile.report.clock import Clock
from cecompile.runtime import Counter, Progress, Runtime
from cecompile.sizing import Sizing
from cecompile.tasks.question import Question
from cecompile.warming import Ready
from cecompile.workload.encode import encode, max_input_length
from cecompile.workload.plan import BLOCK, Plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass, stage_all

ENGINES = ("compiled", "eager", "reference")
ATTENTIONS = ("auto", "flex", "sdpa")

Outcome = tuple[NDArray[np.float64], NDArray[np.bool_]]  # per sequence: loglikelihood, and whether all is the argmax
Inference = Callable[[], Outcome]


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions made ready to run: their sequences and the plan (None for the reference engine)."""

    sequences: Sequences
    plan: Plan | None
    truncated_questions: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Per question, in order, one entry per choice: summed log-probabilities, and whether greedy decoding says it.

    `inference_s` are the seconds of each run of the inference phase.
    """

    loglikelihoods: list[tuple[float, ...]]
    greedy: list[tuple[bool, ...]]
    workload: Workload
    inference_s: list[float]


class Scorer:
    """Scores questions with one model. Made by `from_pretrained`; weights are loaded by the first `score`.

    Args:
        runtime: the model on its device.
        tokenizer: the model's.
    """

    def __init__(self, runtime: Runtime, tokenizer: Any) -> None:
        self.runtime = runtime
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
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
    ) -> "Scorer":
        """A scorer for a checkpoint.

        Args:
            model: a directory or hub id of a decoder-only model with safetensors weights; None is the embedded demo.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
            engine: "compiled", "eager" (the same pass uncompiled) or "reference" (each choice alone, stock model).
            attention: "auto", "flex" or "sdpa"; "auto" picks by device and by a probe.
            tokens_per_bucket: token slots of a pass; None picks by device and memory.
            memory_limit: bytes the run may take, of the device's memory; None is what there is.
            cache_dir: of compiled code; None is CECOMPILE_CACHE, else the user's cache directory.
            require_warm: refuse to compile what is not in the cache.

        Raises:
            UserError: there is no such model, device or option, or the cache directory is not safe.
        """
        checks = (
            (engine, ENGINES, "engine"),
            (attention, ATTENTIONS, "attention"),
            (dtype, ("auto", *DTYPES), "dtype"),
        )
        for value, known, option in checks:
            if value not in known:
                raise UserError(f"{option} '{value}': one of {', '.join(known)}")
        if tokens_per_bucket is not None and tokens_per_bucket < BLOCK:
            raise UserError(f"tokens per bucket: {tokens_per_bucket} is too few, at least {BLOCK}")
        path = str(demo.MODEL if model is None else model)
        resolved = resolve_device(device)
        config, tokenizer = load_config(path), load_tokenizer(path)
        if memory_limit is not None:
            memory.enforce(resolved, memory_limit)
        sizing = Sizing(path, config, resolved, dtype, tokens_per_bucket, memory_limit)
        cache, note = None, None
        if engine == "compiled":
            try:
                cache = CompileCache(Path(cache_dir) if cache_dir else default_directory())
            except NoCacheError as error:
                if cache_dir or require_warm:
                    raise
                note = f"compiled without a cache: {error}"
        runtime = Runtime(path, config, resolved, dtype, engine, attention, sizing, cache, require_warm)
        if note:
            runtime.remark(note)
        return cls(runtime, tokenizer)

    def prepare(self, questions: Sequence[Question], *, fit: bool = False) -> Workload:
        """Encodes the questions and makes the plan. Loads no weights.

        Args:
            questions: at least one.
            fit: hold the plan against the memory there is.

        Raises:
            UserError: a question cannot be encoded for this model, or nothing fits.
        """
        runtime = self.runtime
        encoded = encode(questions, self.tokenizer, max_input_length(runtime.config, self.tokenizer))
        check_vocabulary(runtime.name, self.tokenizer, runtime.config, int(encoded.sequences.token_ids.max()))
        plan = None if runtime.engine == "reference" else runtime.plan(encoded.sequences, fit)
        return Workload(encoded.sequences, plan, encoded.truncated_questions)

    def score(
        self, questions: Sequence[Question], *, clock: Clock | None = None, progress: Progress = lambda *_: None,
        repeat: int = 1,
    ) -> Scores:  # fmt: skip
        """Loglikelihoods of every choice of every question.

        Args:
            questions: at least one.
            clock: books the phases `preprocess`, `load_model`, `warmup` and `inference`, and is left in the last.
            progress: called as (phase, done, total) while warming up and inferring.
            repeat: times to run the inference phase.

        Raises:
            UserError: the questions or the checkpoint cannot be used.
            CheckError: the model gives a loglikelihood that is not a number, what runs is not what the stock model
                computes, or the cache is not warm and has to be.
        """
        clock = clock or Clock()
        clock.enter("preprocess")
        workload = self.prepare(questions, fit=True)
        ready = self._one_by_one if workload.plan is None else self._packed
        run, workload = ready(questions, workload, clock, progress)
        clock.enter("inference")
        outcomes, seconds = [], []
        for _ in range(repeat):
            began = perf_counter()
            outcomes.append(run())
            seconds.append(perf_counter() - began)
        loglikelihoods, greedy = _by_question(questions, workload, *outcomes[0])
        return Scores(loglikelihoods, greedy, workload, seconds)

    def _one_by_one(
        self, questions: Sequence[Question], workload: Workload, clock: Clock, progress: Progress
    ) -> tuple[Inference, Workload]:
        """Loads the stock model; returns what scores each sequence alone."""
        clock.enter("load_model")
        model, sequences = self.runtime.load(), workload.sequences
        return lambda: score_one_by_one(model, sequences, Counter("inference", len(sequences), progress)), workload

    def _packed(
        self, questions: Sequence[Question], workload: Workload, clock: Clock, progress: Progress
    ) -> tuple[Inference, Workload]:
        """Loads and warms up; returns what runs the passes, and the workload as it is planned in the end."""
        assert workload.plan is not None
        clock.enter("warmup")
        self.runtime.look_up(workload.plan.buckets)
        clock.enter("load_model")
        self.runtime.load()
        clock.enter("warmup")
        replan = self.runtime.probe()
        engine = None
        while engine is None:
            clock.enter("preprocess")
            if replan:
                workload = self.prepare(questions, fit=True)
            plan, sequences = workload.plan, workload.sequences
            assert plan is not None
            staged = list(stage_all(plan))
            clock.enter("warmup")
            engine = self.runtime.engine_for(Ready(plan.geometry, plan.buckets, sequences, staged), progress)
            replan = True  # memory ran out

        def run() -> Outcome:
            return collect(len(sequences), staged, engine.run(staged, Counter("inference", len(staged), progress)))

        return run, workload


def collect(count: int, staged: Sequence[StagedPass], readouts: Sequence[Readouts]) -> Outcome:
    """Sums readouts by sequence, in float64: (count,) loglikelihoods and whether every argmax was the target."""
    loglikelihood = np.zeros(count)
    misses = np.zeros(count, dtype=np.int64)
    for one, out in zip(staged, readouts, strict=True):
        np.add.at(loglikelihood, one.choice, out.logprob)
        np.add.at(misses, one.choice, out.argmax != one.target)
    return loglikelihood, misses == 0


def _by_question(
    questions: Sequence[Question],
    workload: Workload,
    loglikelihood: NDArray[np.float64],
    greedy: NDArray[np.bool_],
) -> tuple[list[tuple[float, ...]], list[tuple[bool, ...]]]:
    bad = np.flatnonzero(~np.isfinite(loglikelihood))
    if len(bad):
        question = questions[int(workload.sequences.questions[bad[0]])]
        raise CheckError(
            f"question '{question.id}': the model's loglikelihood is {loglikelihood[bad[0]]}; nothing was written"
        )
    bounds = np.searchsorted(workload.sequences.questions, np.arange(1, len(questions)))
    return (
        [tuple(part.tolist()) for part in np.split(loglikelihood, bounds)],
        [tuple(part.tolist()) for part in np.split(greedy, bounds)],
    )
