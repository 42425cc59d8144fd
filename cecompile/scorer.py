"""The scorer: a model and the way it runs, from questions to loglikelihoods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel

from cecompile import demo
from cecompile.engine.forward import Engine, Readouts
from cecompile.engine.model import (
    DTYPES,
    check_vocabulary,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from cecompile.engine.probe import choose_attention, rope_type
from cecompile.engine.reference import score_one_by_one
from cecompile.engine.verify import disagreement
from cecompile.errors import CheckError, UserError, first_line, printable
from cecompile.report.clock import Clock
from cecompile.tasks.question import Question
from cecompile.workload.encode import encode, max_input_length
from cecompile.workload.plan import Bucket, Geometry, Plan, choose_geometry, make_plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPass, stage_all

ENGINES = ("compiled", "eager", "reference")
ATTENTIONS = ("auto", "flex", "sdpa")

Progress = Callable[[str, int, int], None]  # (phase, done, total)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes that suit a kind of device.

    Attributes:
        tokens_per_bucket: slots a pass.
        readout_chunk: readouts whose logits are held at once.
    """

    tokens_per_bucket: int
    readout_chunk: int


TUNING = {"cpu": Tuning(2048, 256), "cuda": Tuning(8192, 1024)}


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions made ready to run: their sequences and the plan (None for the reference engine)."""

    sequences: Sequences
    plan: Plan | None
    truncated_questions: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Per question, in order, one entry per choice: summed log-probabilities, and whether greedy decoding says it."""

    loglikelihoods: list[tuple[float, ...]]
    greedy: list[tuple[bool, ...]]
    workload: Workload


class Scorer:
    """Scores questions with one model. Made by `from_pretrained`; weights are loaded by the first `score`."""

    def __init__(
        self, name: str, config: Any, tokenizer: Any, device: torch.device, dtype: str, engine: str, attention: str,
        tokens_per_bucket: int | None,
    ) -> None:  # fmt: skip
        self.name = name
        self.config = config
        self.tokenizer = tokenizer
        self.device = device
        self.engine = engine
        self.note: str | None = None  # what a reader of the result has to know of how it ran
        self.model: PreTrainedModel | None = None  # once loaded
        self.fingerprint: str | None = None  # once loaded
        tuning = TUNING[device.type]
        self._dtype = dtype
        self._tuning = tuning
        self._tokens_per_bucket = tokens_per_bucket or tuning.tokens_per_bucket
        self._stock_attention = "eager"  # what it is, once loaded
        self._probed = False
        self._engine: Engine | None = None
        self._wanted_attention = attention
        self.attention = attention if attention != "auto" else ("flex" if device.type == "cuda" else "sdpa")

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
    ) -> "Scorer":
        """A scorer for a checkpoint.

        Args:
            model: a directory or hub id of a decoder-only model with safetensors weights; None is the embedded demo.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
            engine: "compiled", "eager" (the same pass uncompiled) or "reference" (each choice alone, stock model).
            attention: "auto", "flex" or "sdpa"; "auto" picks by device and by a probe.
            tokens_per_bucket: token slots of a pass; None picks by device.

        Raises:
            UserError: there is no such model, device or option.
        """
        checks = (
            (engine, ENGINES, "engine"),
            (attention, ATTENTIONS, "attention"),
            (dtype, ("auto", *DTYPES), "dtype"),
        )
        for value, known, option in checks:
            if value not in known:
                raise UserError(f"{option} '{value}': one of {', '.join(known)}")
        if tokens_per_bucket is not None and tokens_per_bucket < 128:
            raise UserError(f"tokens per bucket: {tokens_per_bucket} is too few, at least 128")
        path = str(demo.MODEL if model is None else model)
        resolved = resolve_device(device)
        config, tokenizer = load_config(path), load_tokenizer(path)
        return cls(path, config, tokenizer, resolved, dtype, engine, attention, tokens_per_bucket)

    def prepare(self, questions: Sequence[Question]) -> Workload:
        """Encodes the questions and makes the plan. Loads no weights.

        Raises:
            UserError: a question cannot be encoded for this model.
        """
        encoded = encode(questions, self.tokenizer, max_input_length(self.config, self.tokenizer))
        longest = int(encoded.sequences.input_lengths.max())
        if self.engine != "reference":
            self._check_rope(longest)
        check_vocabulary(self.name, self.tokenizer, self.config, int(encoded.sequences.token_ids.max()))
        plan = None
        if self.engine != "reference":
            plan = make_plan(encoded.sequences, self._geometry(encoded.sequences))
        return Workload(encoded.sequences, plan, encoded.truncated_questions)

    def score(
        self, questions: Sequence[Question], *, clock: Clock | None = None, progress: Progress = lambda *_: None
    ) -> Scores:
        """Loglikelihoods of every choice of every question.

        Args:
            questions: at least one.
            clock: books the phases `preprocess`, `load_model`, `warmup` and `inference`, and is left in the last.
            progress: called as (phase, done, total) while warming up and inferring.

        Raises:
            UserError: the questions or the checkpoint cannot be used.
            CheckError: the model gives a loglikelihood that is not a number.
        """
        clock = clock or Clock()
        clock.enter("preprocess")
        workload = self.prepare(questions)
        clock.enter("load_model")
        model = self._load()
        if self.engine == "reference":
            return self._score_reference(model, questions, workload, clock, progress)
        clock.enter("warmup")
        planned = self.attention
        self._probe(model)
        clock.enter("preprocess")
        if self.attention != planned:
            workload = self.prepare(questions)
        assert workload.plan is not None
        staged = list(stage_all(workload.plan))
        clock.enter("warmup")
        engine = self._warm_engine(model, workload, staged, progress)
        clock.enter("inference")
        counter = _Counter("inference", len(staged), progress)
        readouts = engine.run(staged, counter)
        loglikelihood, greedy = collect(len(workload.sequences), staged, readouts)
        return _by_question(questions, workload, loglikelihood, greedy)

    def _check_rope(self, longest: int) -> None:
        """longrope picks one factor for a whole batch, by its longest sequence: trees on both sides do not mix."""
        config = self.config.get_text_config()
        original = getattr(config, "original_max_position_embeddings", None)
        if rope_type(config) == "longrope" and original is not None and longest > original:
            raise UserError(
                f"{self.name}: sequences of up to {longest} tokens, where its longrope changes at {original}: "
                "cannot be scored as trees; --engine reference scores them"
            )

    def _geometry(self, sequences: Sequences) -> Geometry:
        return choose_geometry(
            int(sequences.input_lengths.max()),
            tokens_per_bucket=self._tokens_per_bucket,
            blocks=self.attention == "flex",
            readout_chunk=self._tuning.readout_chunk,
        )

    def _load(self) -> PreTrainedModel:
        if self.model is None:
            self.model = load_model(self.name, self.config, self._dtype, self.device)
            self._stock_attention = self.model.config._attn_implementation
            self.fingerprint = fingerprint(self.name)
        return self.model

    def _probe(self, model: PreTrainedModel) -> None:
        if not self._probed:
            self.attention, reason = choose_attention(model, self._wanted_attention)
            self.note = reason and f"attention {self.attention}, because {printable(reason, 200)}"
            self._probed = True

    def _warm_engine(
        self, model: PreTrainedModel, workload: Workload, staged: Sequence[StagedPass], progress: Progress
    ) -> Engine:
        """An engine with every bucket warm and checked: the last one if it fits, else a new one.

        It is uncompiled, with a note, if nothing compiles or what compiles is wrong.
        """
        assert workload.plan is not None
        buckets = workload.plan.buckets
        if self._engine is not None and self._engine.buckets == buckets:
            return self._engine
        self._engine = None  # frees its buffers first
        try:
            if self.engine == "compiled":
                self._engine = self._checked_engine(model, buckets, workload.sequences, staged, progress)
            if self._engine is None:
                self.engine = "eager"
                self._engine = self._checked_engine(model, buckets, workload.sequences, staged, progress)
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.name}: out of memory on {self.device} with buckets of {buckets[0].slots} tokens; "
                "try a smaller --tokens-per-bucket"
            ) from None
        if self._engine is None:
            raise CheckError(f"{self.name}: {self.note}; nothing was written")
        return self._engine

    def _checked_engine(
        self, model: PreTrainedModel, buckets: Sequence[Bucket], sequences: Sequences,
        staged: Sequence[StagedPass], progress: Progress,
    ) -> Engine | None:  # fmt: skip
        """A warm engine that agrees with the stock model, or None and a note."""
        compiled = self.engine == "compiled"
        chunk = self._tuning.readout_chunk
        try:
            engine = Engine(model, buckets, attention=self.attention, compiled=compiled, readout_chunk=chunk)
            engine.warm_up(_Counter("warmup", len(buckets), progress))
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            # no C++ compiler, no Triton, or a layer that does not compile
            if not compiled:
                raise
            self.note = f"ran uncompiled: {printable(first_line(error), 200)}"
            return None
        off = disagreement(engine, model, self._stock_attention, sequences, staged)
        if off <= 1:
            return engine
        wrong = f"the {self.engine} pass is {off:.2g} times as far from the stock model as rounding explains"
        self.note = f"ran uncompiled: {wrong}" if compiled else wrong
        return None

    def _score_reference(
        self, model: PreTrainedModel, questions: Sequence[Question], workload: Workload, clock: Clock,
        progress: Progress,
    ) -> Scores:  # fmt: skip
        clock.enter("inference")
        counter = _Counter("inference", len(workload.sequences), progress)
        loglikelihood, greedy = score_one_by_one(model, workload.sequences, counter)
        return _by_question(questions, workload, loglikelihood, greedy)


class _Counter:
    """Turns "one more is done" into progress."""

    def __init__(self, phase: str, total: int, progress: Progress) -> None:
        self._phase, self._total, self._progress = phase, total, progress
        self._done = 0
        progress(phase, 0, total)

    def __call__(self, _: Any) -> None:
        self._done += 1
        self._progress(self._phase, self._done, self._total)


def collect(
    count: int, staged: Sequence[StagedPass], readouts: Sequence[Readouts]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
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
) -> Scores:
    bad = np.flatnonzero(~np.isfinite(loglikelihood))
    if len(bad):
        question = questions[int(workload.sequences.questions[bad[0]])]
        raise CheckError(
            f"question '{question.id}': the model's loglikelihood is {loglikelihood[bad[0]]}; nothing was written"
        )
    bounds = np.searchsorted(workload.sequences.questions, np.arange(1, len(questions)))
    return Scores(
        [tuple(part.tolist()) for part in np.split(loglikelihood, bounds)],
        [tuple(part.tolist()) for part in np.split(greedy, bounds)],
        workload,
    )
