"""Builds a warm engine from a model and a plan's buckets, checks the engine and writes the cache."""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel

from cecompile.compile_cache.store import WARM, Entry, ProbeResult
from cecompile.device import is_out_of_memory
from cecompile.engine.decode import Decoder, NotDecodableError
from cecompile.engine.forward import Engine, Readouts
from cecompile.engine.parts import CannotCompileError
from cecompile.engine.verify import Expected, decoding_disagreement, disagreement
from cecompile.errors import CheckError, UserError, first_line, printable
from cecompile.partitioned.layer_feed import LayerFeed
from cecompile.partitioned.pipeline import Stage
from cecompile.partitioned.streaming import StreamingEngine
from cecompile.partitioned.verify import pipeline_disagreement, sweep_disagreement
from cecompile.run.passes import Begun
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket
from cecompile.workload.stage import StagedPass, StagedPlan

Done = Callable[[Any], None]


class StageError(Exception):
    """Another stage of a pipeline cannot compile its layers. The message gives the reason."""


# no C++ compiler, no Triton, an option that torch does not know, or a layer that does not compile
NOT_COMPILED = (TorchDynamoException, FailOnRecompileLimitHit, CannotCompileError, StageError)


@dataclass(slots=True)
class WarmEngine:
    """A warm engine, and the record of the warm-up.

    Attributes:
        name: "compiled" or "eager".
        compiled: the fixed shapes that the engine is warm for.
        found: probe results that the code was compiled under.
        decoder: decodes answers; None where nothing is decoded, or where this model cannot be decoded with our cache.
        note: the reason where the engine is not the one asked for, or None.
        seconds: time to compile, run and capture each fixed shape, by the shape in words.
        moments: the time when each fixed shape was warm, by `time.perf_counter()`.
        begun: passes that ran as the engine was checked, until taken; None where CUDA graphs make passes cheap.
    """

    engine: Engine | StreamingEngine
    name: str
    compiled: tuple[Bucket | DecodeShape, ...]
    found: ProbeResult
    decoder: Decoder | None = None
    note: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    moments: dict[str, float] = field(default_factory=dict)
    begun: Begun | None = None

    @property
    def streaming(self) -> dict[str, Any] | None:
        """results.json's `streaming`; None where all weights are in memory."""
        engine = self.engine
        return asdict(engine.streaming) if isinstance(engine, StreamingEngine) and engine.streaming else None

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The modules that run in place of layers that are not loaded."""
        return self.engine.modules if isinstance(self.engine, StreamingEngine) else ()

    def remark(self, note: str | None) -> None:
        """Adds to the note; None adds nothing."""
        self.note = "; ".join(part for part in (self.note, note) if part) or None


@dataclass(slots=True)
class EngineBuilder:
    """Makes engines for one model.

    Attributes:
        model: the model, on its device.
        stock: the model's own attention implementation.
        attention: "flex" or "sdpa", chosen by the probe.
        readout_chunk: see `Engine`.
        entry: the model's entry in the compile cache; None compiles without a cache.
        stage: the part of a pipeline that the model is; None is a whole model.
        gather: collects a value from all ranks, in their order. All stages come to the same engine.
        feed: reads the layers' weights, where layers are streamed.
        passes: the number of passes that go through a streamed layer together.
        precompiled: the engine that `begin` made.
    """

    model: PreTrainedModel
    stock: str
    attention: str
    readout_chunk: int
    entry: Entry | None
    stage: Stage | None = None
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]
    feed: LayerFeed | None = None
    passes: int = 1
    precompiled: Engine | None = None

    def begin(self, ready: StagedPlan) -> Engine | None:
        """Returns a compiled engine that has run every bucket, of a model whose weights are still being read.

        Returns None after any error: `warm` will meet the same error and report the error.
        """
        with suppress(Exception):
            engine = self._made(ready, compiled=True)
            assert isinstance(engine, Engine)
            engine.settle()
            return engine
        return None

    def warm(self, name: str, ready: StagedPlan, done: Done) -> WarmEngine:
        """Returns an engine with every bucket warm. Where compiling fails or is wrong, the engine is eager.

        Args:
            name: "compiled" or "eager".
            ready: the plan to warm up for.
            done: called after each bucket.

        Raises:
            CheckError: not even the uncompiled pass agrees with the stock model.
        """
        note = None
        if name == "compiled":
            try:
                warmed = self._in_all_stages(lambda: self._engine(name, ready, done))
                note = self._wrong(warmed, ready)
            except NOT_COMPILED as error:
                note = printable(first_line(error), 200)
            if note is None:
                warmed.remark(self._publish(ready, warmed.found))
                return warmed
        warmed = self._in_all_stages(lambda: self._engine("eager", ready, done))
        wrong = self._wrong(warmed, ready)
        if wrong:
            raise CheckError(f"{wrong}; nothing was written")
        warmed.remark(note and f"ran uncompiled: {note}")
        return warmed

    def _in_all_stages(self, make: Callable[[], WarmEngine]) -> WarmEngine:
        """Makes an engine in every stage.

        Where one stage fails, because nothing compiles or memory runs out, every stage fails with the same error.
        """
        if self.stage is None:
            return make()
        made: WarmEngine | None = None
        error: Exception | None = None
        try:
            made = make()
        except NOT_COMPILED as caught:
            error = caught
        except Exception as caught:
            if not is_out_of_memory(caught):
                raise
            error = torch.OutOfMemoryError(str(caught))
        failed = [one for one in self.gather(error and (type(error) is torch.OutOfMemoryError, str(error))) if one]
        if failed:
            out_of_memory, message = max(failed)
            raise torch.OutOfMemoryError(message) if out_of_memory else StageError(message)
        assert made is not None
        return made

    def _engine(self, name: str, ready: StagedPlan, done: Done) -> WarmEngine:
        began = perf_counter()
        precompiled, self.precompiled = self.precompiled, None
        engine: Engine | StreamingEngine
        if name == "compiled" and precompiled is not None and precompiled.is_for(ready.buckets, self.attention):
            engine = precompiled
        else:
            engine = self._made(ready, name == "compiled")
        free = engine.inputs_free if isinstance(engine, Engine) else None
        warmed = WarmEngine(engine, name, ready.compiled, ProbeResult(self.attention, free))

        def book(what: str) -> None:
            nonlocal began
            now = perf_counter()
            warmed.seconds[what], warmed.moments[what], began = now - began, now, now
            done(what)

        engine.warm_up(lambda b: book(f"{b.rows} x {b.length} tokens, {b.readouts} readouts"))
        if ready.decoding is not None and isinstance(engine, Engine):
            slots = ready.decoding.slots
            try:
                decoder = engine.decoder(ready.decoding)
                decoder.warm_up(lambda tokens: book(f"decoding, {tokens} tokens a step, cache of {slots}"))
                warmed.decoder = decoder
            except NotDecodableError as reason:
                warmed.remark(f"answers outside the tree by the stock model alone: {reason}")
        return warmed

    def _made(self, ready: StagedPlan, compiled: bool) -> Engine | StreamingEngine:
        how: Any = {"attention": self.attention, "compiled": compiled, "readout_chunk": self.readout_chunk}
        if self.feed is None:
            return Engine(self.model, ready.buckets, stage=self.stage, inputs_free=self._known(ready), **how)
        return StreamingEngine(self.model, ready.buckets, self.feed, passes=self.passes, **how)

    def _known(self, ready: StagedPlan) -> bool | None:
        """True if a layer may overwrite its input, as the cache recorded; None where the cache lacks a shape."""
        if self.entry is None or self.entry.found is None or self.stage is not None:
            return None  # a stage has its own answer
        return self.entry.found.inputs_are_free if self.entry.state(ready.compiled)[0] == WARM else None

    def _wrong(self, warmed: WarmEngine, ready: StagedPlan) -> str | None:
        if ready.sequences is None:
            return None
        try:
            off: float | None
            against_stock = (self.model, self.stock, ready.sequences, ready.staged)
            expected: Expected = {}
            if isinstance(warmed.engine, StreamingEngine):
                off = sweep_disagreement(warmed.engine, *against_stock)
            elif self.stage is not None:
                off = pipeline_disagreement(warmed.engine, self.stage, *against_stock)
            else:
                off = disagreement(functools.partial(_checked_run, warmed), *against_stock, expected)
            if warmed.decoder is not None:
                assert off is not None
                off = max(off, decoding_disagreement(warmed.decoder, *against_stock[:3], expected))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.stage is not None:  # the others wait for what it would have sent
                raise CheckError(f"out of memory as the {warmed.name} pass was checked") from None
            off = None
        found = self.gather(off) if self.stage is not None else [off]
        if None in found:
            warmed.remark("not verified against the stock model: too little memory left")
            return None
        off = max(found)
        if off <= 1:
            return None
        return f"the {warmed.name} pass is {off:.2g} times as far from the stock model as rounding explains"

    def _publish(self, ready: StagedPlan, found: ProbeResult) -> str | None:
        """Writes new code into the cache. Returns the reason as a note where writing fails, else None."""
        if self.entry is not None and self.entry.state(ready.compiled)[0] != WARM:
            try:
                self.entry.publish(ready.compiled, ready.geometry, found)
            except UserError as error:
                return f"compile cache not written: {printable(str(error), 200)}"
        return None


def _checked_run(warmed: WarmEngine, passes: Iterable[StagedPass]) -> list[Readouts]:
    """Runs passes for the check. Keeps their readouts where no CUDA graph makes passes cheap."""
    passes, began = list(passes), perf_counter()
    readouts = warmed.engine.run(passes)
    if isinstance(warmed.engine, Engine) and not warmed.engine.captured:
        warmed.begun = Begun(list(zip(passes, readouts, strict=True)), began, perf_counter())
    return readouts


def useful_tokens_per_second(engine: Engine | StreamingEngine, staged: Sequence[StagedPass]) -> float:
    """Returns useful tokens a second of a warm engine's first eight passes, by the fastest of three repeats."""
    some = staged[:8]
    best = float("inf")
    for _ in range(3):
        began = perf_counter()
        engine.run(some)
        best = min(best, perf_counter() - began)
    return sum(one.tokens for one in some) / best
