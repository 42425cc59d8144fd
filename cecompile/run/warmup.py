"""The warm-up of a run: the probe, the compile cache, and an engine with every bucket warm."""

import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from cecompile import device as device_memory
from cecompile.compile_cache.store import WARM, CompileCache, Entry
from cecompile.engine import initialise
from cecompile.engine.attention import attention_before
from cecompile.engine.forward import Engine
from cecompile.engine.probe import choose_attention
from cecompile.errors import CheckError, UserError, printable
from cecompile.imports import uncollected
from cecompile.model.support import takes_ours
from cecompile.model.unchanged import Content, made_buffers
from cecompile.planning.planner import Mode, Planner, largest
from cecompile.ranks import Ranks
from cecompile.run.compile_apart import compile_apart, job_for
from cecompile.run.context import Counter, Progress
from cecompile.run.engine_builder import EngineBuilder, WarmEngine
from cecompile.run.weights import Weights, WhileReading
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket, Plan
from cecompile.workload.stage import StagedPlan


class Warmup:
    """Warm engines for one model.

    Args:
        name: the model's, for messages.
        device: the device that runs.
        mode: the engine and attention in use. Where neither compiling nor an attention works, warm-up changes the mode.
        planner, weights: of the same model; the planner has the options of the run.
        cache: of compiled code; None does without.
        facts: gives what compiled code depends on, for the cache's key.
        ranks: the processes that share the work; they take the same decisions.

    Attributes:
        entry: the model's entry in the cache, once opened.
        cache_state: "warm", "partly warm" or "cold", and the reason, once known.
        warmed: the warm engine in use.
    """

    def __init__(
        self, name: str, device: torch.device, mode: Mode, planner: Planner, weights: Weights,
        cache: CompileCache | None, facts: Callable[[], dict[str, Any]], ranks: Ranks,
    ) -> None:  # fmt: skip
        self.entry: Entry | None = None
        self.cache_state: tuple[str, str] | None = None
        self.warmed: WarmEngine | None = None
        self._name, self._device, self._mode = name, device, mode
        self._planner, self._weights, self._options = planner, weights, planner.sizing.options
        self._cache, self._facts = cache, facts
        self._ranks = ranks
        self._probed = self._compiled_apart = False
        self._capacity_in_passes = 0  # of a streamed engine

    def open_cache(self) -> Entry | None:
        """Points the compiler at the model's entry. Raises UserError where the file system refuses."""
        if self._mode.engine != "compiled":
            return None
        if self._cache is not None:
            self.entry = self._cache.open(self._facts())
        initialise.begin(self._device)  # in the entry's directory
        return self.entry

    def look_up(self, plan: Plan) -> None:
        """Looks up how much of a plan the cache holds.

        Raises:
            CheckError: the cache lacks a part of the plan, and `require_warm` is set.
        """
        entry = None if self._is_warm(plan.compiled) else self.open_cache()
        if entry is None:
            return
        self.cache_state = entry.state(plan.compiled)
        if self._options.require_warm and self.cache_state[0] != WARM:
            raise CheckError(f"{self._name}: the compile cache is {self.cache_state[0]}: {self.cache_state[1]}")

    def lacks(self, plan: Plan | StagedPlan) -> bool:
        """Whether a process of its own has to compile a part of a plan before the weights are loaded."""
        unified = device_memory.is_integrated(self._device) and self._planner.dtype is not None
        if self.entry is None or not unified or self._ranks.size > 1 or self._options.stream_weights:
            return False
        return self.entry.state(plan.compiled)[0] != WARM

    def compile_apart(self, ready: StagedPlan, progress: Progress) -> bool:
        """Compiles in a process of its own; True if nothing was compiled because another attention is needed."""
        assert self._cache is not None
        job = job_for(ready, self._planner, self._mode.attention, self._device, self._cache.directory, self._facts())
        outcome = compile_apart(job, Counter("warmup", ready.steps, progress))
        if outcome.attention != self._mode.attention:
            self._mode.attention = outcome.attention
            self._mode.remark(f"attention {outcome.attention}, because {printable(outcome.reason or '', 200)}")
            self._planner.forget_shapes()
            return True
        self._mode.remark(outcome.reason and f"compiled beside the weights: {outcome.reason}")
        if outcome.reason is None:
            self.entry, self._compiled_apart = self._cache.open(self._facts()), True
        return False

    def while_reading(self, plan: Plan) -> WhileReading | None:
        """Compiles for a plan while the weights are read; None where compiling has to wait for the weights.

        The cache must hold every probe result that needs the weights, and memory must hold the passes too.
        """
        if self.entry is None or self.entry.state(plan.compiled)[0] != WARM:
            return None
        found = self.entry.found
        if found is None or found.attention != self._mode.attention:
            return None
        if found.inputs_are_free is None and self._device.type == "cuda":
            return None
        if not self._planner.fits_beside_reading(plan):
            return None
        return functools.partial(self._precompile, plan)

    def _precompile(self, plan: Plan, model: PreTrainedModel) -> tuple[dict[str, Content], Engine | None]:
        """Returns digests for `Proof` of the buffers that the model's code has made, and the compiled engine."""
        buffers = made_buffers(model)
        initialise.begin(self._device).join()
        chunk = self._planner.sizing.tuning.readout_chunk
        builder = EngineBuilder(model, attention_before(model), self._mode.attention, chunk, self.entry)
        return buffers, builder.begin(StagedPlan(plan.geometry, plan.buckets, plan.decoding))

    def probe(self) -> bool:
        """Chooses the attention by a check on the loaded model; True if the plan is for another attention.

        An attention recorded in the cache is taken without a check: an earlier run has checked the attention for this
        configuration on this device, and the warm engine is compared with the loaded model once more.

        Raises:
            UserError: no attention computes this model exactly.
        """
        planned = self._mode.attention
        if self._weights.stage is not None:  # has too little of the model; its warm engine is checked all the same
            return False
        if not self._probed and self._planner.sizing.needs.streamed is not None:  # likewise
            if planned == "flex" and not takes_ours(self._weights.load()):
                self._mode.attention = "sdpa"
        elif not self._probed:
            self._choose_attention(planned)
        self._probed = True
        if self._mode.attention != planned:
            self._planner.forget_shapes()
        return self._mode.attention != planned

    def _choose_attention(self, planned: str) -> None:
        mode = self._mode
        is_warm = self._compiled_apart or (self.cache_state is not None and self.cache_state[0] == WARM)
        known = self.entry.found if self.entry is not None and is_warm else None
        if known is None or known.attention != planned:
            mode.attention, reason = choose_attention(self._weights.load(), self._options.attention)
            if reason:
                mode.remark(f"attention {mode.attention}, because {printable(reason, 200)}")
        if self._ranks.any(mode.attention == "sdpa") and mode.attention != "sdpa":
            mode.attention, _ = choose_attention(self._weights.load(), "sdpa")
            mode.remark("attention sdpa, because another rank cannot do with flex")

    def engine_for(self, ready: StagedPlan, progress: Progress) -> WarmEngine | None:
        """Returns a warm engine, the last one if shapes match; None if memory ran out and buckets must be smaller."""
        if not self._is_warm(ready.compiled, len(ready.staged)):
            if self.entry is not None and not self._compiled_apart:
                self.cache_state = self.entry.state(ready.compiled)
            warmed = self.warm(ready, progress)
            if warmed is None:
                return None
            self.warmed, self._capacity_in_passes, self._mode.engine = warmed, len(ready.staged), warmed.name
            self._mode.remark(warmed.note)
        return self.warmed

    def warm(self, ready: StagedPlan, progress: Progress) -> WarmEngine | None:
        """Returns a new warm engine; None if memory ran out on any rank and a smaller bucket is left to try.

        Raises:
            UserError: memory ran out on the smallest.
        """
        if self.warmed is not None:  # its buffers are freed first
            self.warmed = None
            gc.collect()
        slots = ready.buckets[0].slots
        builder = self._builder(ready)
        warmed = None
        if self._mode.engine == "compiled":
            initialise.begin(self._device).join()
        try:
            with uncollected():  # capturing a graph collects garbage first
                warmed = builder.warm(self._mode.engine, ready, Counter("warmup", ready.steps, progress))
        except Exception as error:
            if not device_memory.is_out_of_memory(error):
                raise
        if not self._ranks.any(warmed is None):
            return warmed
        warmed = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._planner.sizing.step_down(largest(ready)):
            raise UserError(f"{self._name}: out of memory on {self._device} with the smallest buckets, {slots} tokens")
        self._planner.forget_shapes()
        self._mode.remark(f"buckets made smaller: memory ran out with {slots} tokens")
        return None

    def _builder(self, ready: StagedPlan) -> EngineBuilder:
        weights = self._weights
        model, feed = weights.load(), weights.feed
        passes = -(-len(ready.staged) // self._ranks.size)
        passes = 1 if feed is None else self._planner.passes_at_once(ready, max(1, passes))
        precompiled, weights.precompiled = weights.precompiled, None
        return EngineBuilder(
            model, weights.stock_attention, self._mode.attention, self._planner.sizing.tuning.readout_chunk,
            self.entry, weights.stage, self._ranks.gather, feed, passes, precompiled,
        )  # fmt: skip

    def _is_warm(self, compiled: Sequence[Bucket | DecodeShape], passes: int = 0) -> bool:
        if self.warmed is None or self.warmed.compiled != tuple(compiled):
            return False
        return self._weights.feed is None or passes <= self._capacity_in_passes

    @property
    def moments(self) -> dict[str, float]:
        """The time when each fixed shape of the engine in use was warm, by `time.perf_counter()`."""
        return {} if self.warmed is None else self.warmed.moments
