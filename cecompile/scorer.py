"""The scorer: a model and the way it runs, from questions to loglikelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cecompile import demo
from cecompile.engine import memory
from cecompile.engine.cache import WARM, CompileCache, Entry, NoCacheError, default_directory
from cecompile.engine.forward import Engine, Readouts
from cecompile.engine.model import (
    DTYPES,
    check_vocabulary,
    load_checkpoint,
    load_config,
    load_tokenizer,
    resolve_device,
)
from cecompile.engine.probe import choose_attention, rope_type
from cecompile.engine.reference import score_one_by_one
from cecompile.engine.warm import compile_facts
from cecompile.errors import CheckError, UserError, printable
from cecompile.report.clock import Clock
from cecompile.sizing import Sizing
from cecompile.tasks.question import Question
from cecompile.warming import Ready, Warmed, Warmer, useful_tokens_per_second
from cecompile.workload.encode import encode, max_input_length
from cecompile.workload.plan import BLOCK, Bucket, Geometry, Plan, every_bucket, make_plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass, stage_all

ENGINES = ("compiled", "eager", "reference")
ATTENTIONS = ("auto", "flex", "sdpa")

TUNED_GAIN = 1.03  # how much faster another bucket size must be to be taken

Progress = Callable[[str, int, int], None]  # (phase, done, total)
Outcome = tuple[NDArray[np.float64], NDArray[np.bool_]]  # per sequence: loglikelihood, and whether all is the argmax


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


@dataclass(frozen=True, slots=True)
class Warmup:
    """What `Scorer.warm` has built.

    Attributes:
        before: the cache's state before, "warm", "partly warm" or "cold", and why.
        seconds: per bucket, of compiling, running and capturing it.
        bytes: of the cache entry on disk.
        measured: with tuning, useful tokens a second per bucket size in slots.
    """

    before: tuple[str, str]
    seconds: dict[Bucket, float]
    bytes: int
    measured: dict[int, float] | None


class Scorer:
    """Scores questions with one model. Made by `from_pretrained`; weights are loaded by the first `score`.

    Attributes:
        engine, attention: what runs; where it is not what was asked for, `note` says why.
        cache_state: "warm", "partly warm" or "cold", and why, once warmed up; None where nothing is compiled.
        predicted_bytes: what the memory budget says of the run, once planned.
    """

    def __init__(
        self, name: str, config: Any, tokenizer: Any, device: torch.device, dtype: str, engine: str, attention: str,
        sizing: Sizing, cache: CompileCache | None, require_warm: bool,
    ) -> None:  # fmt: skip
        self.name = name
        self.config = config
        self.tokenizer = tokenizer
        self.device = device
        self.engine = engine
        self.attention = attention if attention != "auto" else ("flex" if device.type == "cuda" else "sdpa")
        self.note: str | None = None
        self.model: PreTrainedModel | None = None
        self.fingerprint: str | None = None
        self.cache_state: tuple[str, str] | None = None
        self.predicted_bytes: int | None = None
        self._dtype = dtype
        self._wanted_attention = attention
        self._stock_attention = "eager"  # what it is, once loaded
        self._probed = False
        self._sizing = sizing
        self._cache = cache if engine == "compiled" else None
        self._require_warm = require_warm
        self._entry: Entry | None = None
        self._engine: Engine | None = None

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
        scorer = cls(path, config, tokenizer, resolved, dtype, engine, attention, sizing, cache, require_warm)
        scorer.note = note
        return scorer

    @property
    def memory_limit(self) -> int | None:
        """Bytes the run may take, once known."""
        return self._sizing.limit

    def prepare(self, questions: Sequence[Question], *, fit: bool = False) -> Workload:
        """Encodes the questions and makes the plan. Loads no weights.

        Args:
            questions: at least one.
            fit: hold the plan against the memory there is.

        Raises:
            UserError: a question cannot be encoded for this model, or nothing fits.
        """
        encoded = encode(questions, self.tokenizer, max_input_length(self.config, self.tokenizer))
        longest = int(encoded.sequences.input_lengths.max())
        check_vocabulary(self.name, self.tokenizer, self.config, int(encoded.sequences.token_ids.max()))
        plan = None
        if self.engine != "reference":
            self._check_rope(longest)
            plan = make_plan(encoded.sequences, self._geometry(longest, fit))
            held = memory.used_already(self.device) if self.model is None else 0
            self.predicted_bytes = self.budget(plan).total + held
        return Workload(encoded.sequences, plan, encoded.truncated_questions)

    def budget(self, plan: Plan, device: str | None = None) -> memory.Budget:
        """What a run of this plan needs, in bytes by part; on another `device`, "cuda", in 16 bits."""
        largest = plan.buckets[0]
        geometry = Geometry(largest.rows, largest.length, plan.geometry.readout_chunk, plan.geometry.blocks)
        return self._sizing.budget(geometry, self.engine, device)

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
        if self.engine == "reference":
            clock.enter("load_model")
            model = self._load()
            clock.enter("inference")

            def one_by_one() -> Outcome:
                counter = _Counter("inference", len(workload.sequences), progress)
                return score_one_by_one(model, workload.sequences, counter)

            return _repeated(one_by_one, repeat, questions, workload)
        assert workload.plan is not None
        clock.enter("warmup")
        self._open_cache(workload.plan.buckets)
        clock.enter("load_model")
        model = self._load()
        clock.enter("warmup")
        planned = self.attention
        self._probe(model)
        if self.attention != planned:
            clock.enter("preprocess")
            workload = self.prepare(questions, fit=True)
        while True:
            clock.enter("preprocess")
            assert workload.plan is not None
            staged = list(stage_all(workload.plan))
            clock.enter("warmup")
            engine = self._warm_engine(model, workload, staged, progress)
            if engine is not None:
                break
            clock.enter("preprocess")
            workload = self.prepare(questions, fit=True)
        clock.enter("inference")
        warm_engine = engine

        def packed() -> Outcome:
            readouts = warm_engine.run(staged, _Counter("inference", len(staged), progress))
            return collect(len(workload.sequences), staged, readouts)

        return _repeated(packed, repeat, questions, workload)

    def warm(
        self, questions: Sequence[Question] | None = None, *, max_depth: int | None = None, tune: bool = False,
        progress: Progress = lambda *_: None,
    ) -> Warmup:  # fmt: skip
        """Compiles and captures every bucket of a plan, and leaves the result in the cache.

        Args:
            questions: what will be scored; or None, for data not yet seen:
            max_depth: tokens of its longest sequence. Every bucket that a plan might use is built then.
            tune: measure bucket sizes on the questions and record the fastest.
            progress: called as (phase, done, total).

        Raises:
            UserError, CheckError: see `score`.
        """
        if self.engine != "compiled":
            raise UserError(f"--engine {self.engine}: nothing to compile")
        if self._cache is None:
            raise UserError(f"{self.name}: {self.note}")
        self._entry = self._cache.open(self._facts())
        model = self._load()
        self._probe(model)
        if questions is not None:
            planned = self.prepare(questions, fit=True).plan
            assert planned is not None
            before = self._entry.state(planned.buckets)
        else:
            before = self._entry.state(every_bucket(self._geometry(max_depth or 1, True)))
        measured = self._tune(model, questions, progress) if tune and questions is not None else None
        while True:
            if questions is not None:
                workload = self.prepare(questions, fit=True)
                assert workload.plan is not None
                staged = list(stage_all(workload.plan))
                ready = Ready(workload.plan.geometry, workload.plan.buckets, workload.sequences, staged)
            else:
                geometry = self._geometry(max_depth or 1, True)
                ready = Ready(geometry, every_bucket(geometry))
            warmed = self._warm(model, ready, progress)
            if warmed is not None:
                break
        if warmed.name != "compiled":
            raise CheckError(f"{self.name}: {warmed.note}")
        if self._entry.state(ready.buckets)[0] != WARM:
            raise UserError(f"{self.name}: {warmed.note}")
        return Warmup(before, warmed.seconds, self._entry.size(), measured)

    def _check_rope(self, longest: int) -> None:
        """longrope picks one factor for a whole batch, by its longest sequence: trees on both sides do not mix."""
        config = self.config.get_text_config()
        original = getattr(config, "original_max_position_embeddings", None)
        if rope_type(config) == "longrope" and original is not None and longest > original:
            raise UserError(
                f"{self.name}: sequences of up to {longest} tokens, where its longrope changes at {original}: "
                "cannot be scored as trees; --engine reference scores them"
            )

    def _geometry(self, longest: int, fit: bool) -> Geometry:
        recorded = self._cache.recorded(self._facts()) if self._cache is not None else None
        geometry = self._sizing.geometry(longest, blocks=self.attention == "flex", recorded=recorded)
        if fit:
            geometry = self._sizing.fitting(geometry, longest, self.engine)
        return geometry

    def _facts(self) -> dict[str, Any]:
        chunk = self._sizing.tuning.readout_chunk
        return compile_facts(self.config, self._dtype, self.device, self._wanted_attention, chunk)

    def _open_cache(self, buckets: Sequence[Bucket]) -> None:
        """Points the compiler at what was compiled before, and says how much of `buckets` that is."""
        if self._cache is None or (self._engine is not None and self._engine.buckets == tuple(buckets)):
            return
        self._entry = self._cache.open(self._facts())
        self.cache_state = self._entry.state(buckets)
        if self._require_warm and self.cache_state[0] != WARM:
            raise CheckError(f"{self.name}: the compile cache is {self.cache_state[0]}: {self.cache_state[1]}")

    def _load(self) -> PreTrainedModel:
        if self.model is None:
            loaded = load_checkpoint(self.name, self.config, self._dtype, self.device)
            self.model, self.fingerprint = loaded.model, loaded.fingerprint
            self._stock_attention = self.model.config._attn_implementation
        return self.model

    def _probe(self, model: PreTrainedModel) -> None:
        if not self._probed:
            self.attention, reason = choose_attention(model, self._wanted_attention)
            if reason:
                self._remark(f"attention {self.attention}, because {printable(reason, 200)}")
            self._probed = True

    def _warm_engine(
        self, model: PreTrainedModel, workload: Workload, staged: Sequence[StagedPass], progress: Progress
    ) -> Engine | None:
        """A warm engine, the last one if it fits; None if memory ran out and buckets have to be smaller now."""
        assert workload.plan is not None
        buckets = workload.plan.buckets
        if self._engine is not None and self._engine.buckets == buckets:
            return self._engine
        if self._entry is not None:
            self.cache_state = self._entry.state(buckets)
        warmed = self._warm(model, Ready(workload.plan.geometry, buckets, workload.sequences, staged), progress)
        if warmed is None:
            return None
        self._engine, self.engine = warmed.engine, warmed.name
        if warmed.note:
            self._remark(warmed.note)
        return self._engine

    def _warm(self, model: PreTrainedModel, ready: Ready, progress: Progress) -> Warmed | None:
        """Warms up; None if memory ran out and there is a smaller bucket to try.

        Raises:
            UserError: memory ran out on the smallest.
        """
        self._engine = None  # frees its buffers first
        chunk = self._sizing.tuning.readout_chunk
        warmer = Warmer(model, self._stock_attention, self.attention, chunk, self._entry)
        counter = _Counter("warmup", len(ready.buckets), progress)
        slots = ready.buckets[0].slots
        try:
            return warmer.warm(self.engine, ready, counter)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._sizing.step_down(ready.geometry):
            raise UserError(f"{self.name}: out of memory on {self.device} with buckets of {slots} tokens")
        self._remark(f"buckets made smaller: memory ran out with {slots} tokens")
        return None

    def _remark(self, note: str) -> None:
        self.note = f"{self.note}; {note}" if self.note else note

    def _tune(
        self, model: PreTrainedModel, questions: Sequence[Question], progress: Progress
    ) -> dict[int, float]:  # fmt: skip
        """Useful tokens a second with buckets of a quarter, half, once and twice the usual size; records the best."""
        assert self._entry is not None
        measured: dict[int, tuple[float, Geometry]] = {}
        usual = self._sizing.tuning.tokens_per_bucket
        for slots in (usual // 4, usual // 2, usual, 2 * usual):
            sizing = self._sizing.of_size(slots)
            sequences = self.prepare(questions).sequences
            longest = int(sequences.input_lengths.max())
            try:
                wanted = sizing.geometry(longest, blocks=self.attention == "flex")
                geometry = sizing.fitting(wanted, longest, self.engine)
            except UserError:
                continue  # does not fit
            plan = make_plan(sequences, geometry)
            staged = list(stage_all(plan))
            warmed = self._warm(model, Ready(geometry, plan.buckets, sequences, staged), progress)
            if warmed is not None:
                measured[slots] = useful_tokens_per_second(warmed.engine, staged), geometry
            del warmed
        if measured:
            best = max(measured, key=lambda n: measured[n][0] * (TUNED_GAIN if n == usual else 1))
            plan = make_plan(sequences, measured[best][1])
            self._entry.publish(plan.buckets, plan.geometry, tuned=True)
        return {slots: rate for slots, (rate, _) in measured.items()}


class _Counter:
    """Turns "one more is done" into progress."""

    def __init__(self, phase: str, total: int, progress: Progress) -> None:
        self._phase, self._total, self._progress = phase, total, progress
        self._done = 0
        progress(phase, 0, total)

    def __call__(self, _: Any) -> None:
        self._done += 1
        self._progress(self._phase, self._done, self._total)


def _repeated(run: Callable[[], Outcome], times: int, questions: Sequence[Question], workload: Workload) -> Scores:
    """Runs inference, times it, and sorts the outcome of the first run by question."""
    outcomes, seconds = [], []
    for _ in range(times):
        began = perf_counter()
        outcomes.append(run())
        seconds.append(perf_counter() - began)
    loglikelihoods, greedy = _by_question(questions, workload, *outcomes[0])
    return Scores(loglikelihoods, greedy, workload, seconds)


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
