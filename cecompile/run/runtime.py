"""A model at work: how it is sized, loaded, checked and warmed up on its device."""

import functools
import gc
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cecompile import device as device_memory
from cecompile.compile_cache.key import compile_facts
from cecompile.compile_cache.store import WARM, CompileCache, Entry
from cecompile.engine import initialise
from cecompile.engine.attention import attention_before, take_back
from cecompile.engine.forward import Engine
from cecompile.engine.parts import compiled_parts
from cecompile.engine.probe import choose_attention
from cecompile.errors import CheckError, UserError, printable
from cecompile.model.checkpoint import checkpoint_files, load_checkpoint
from cecompile.model.load import Loaded
from cecompile.model.safetensors_reader import Checkpoint
from cecompile.model.structure import LayerRange, on_meta
from cecompile.model.support import boundary_of, takes_ours
from cecompile.model.unchanged import Content, Proof, made_buffers
from cecompile.partitioned.layer_feed import Files, LayerFeed, worth_keeping
from cecompile.partitioned.pipeline import Stage, places
from cecompile.partitioned.streaming import StreamingEngine
from cecompile.planning import memory
from cecompile.planning.bucket_size import Sizing
from cecompile.ranks import ALONE, Ranks
from cecompile.results.clock import Clock
from cecompile.run.engine_builder import EngineBuilder, WarmEngine
from cecompile.run.progress import Counter, Progress
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.order import sort_sequences
from cecompile.workload.plan import Bucket, Geometry, Plan, make_plan, with_room
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import StagedPlan
from cecompile.workload.totals import Totals


class Runtime:
    """One model on one device, from its configuration to warm engines.

    Args:
        name: the model's, for messages; a directory or hub id.
        config: the model's configuration.
        device: where it runs.
        dtype, engine, attention: as asked for.
        sizing: of buckets.
        cache: of compiled code; None does without.
        require_warm: refuse to compile what is not in the cache.
        ranks: that share the work; they take the same decisions.

    Attributes:
        engine, attention: what runs; where it is not what was asked for, `note` says why.
        model, checkpoint: once loaded; a model that was adopted has no checkpoint.
        expected_fingerprint: the only one that a checkpoint may have, where there is such.
        entry: the model's entry in the cache, once opened.
        cache_state: "warm", "partly warm" or "cold", and why, once known.
        predicted_bytes: what the memory budget says of the last plan.
        stock_attention: the model's own attention implementation, once loaded.
        stage: what this rank runs of a pipeline, once loaded; None where it runs all of the model.
    """

    def __init__(
        self, name: str, config: Any, device: torch.device, dtype: str, engine: str, attention: str, sizing: Sizing,
        cache: CompileCache | None, require_warm: bool, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.name = name
        self.ranks = ranks
        self.config = config
        self.device = device
        self.sizing = sizing
        self.engine = engine
        self.attention = attention if attention != "auto" else ("flex" if device.type == "cuda" else "sdpa")
        self.note: str | None = None
        self.model: PreTrainedModel | None = None
        self.checkpoint: Checkpoint | None = None
        self.expected_fingerprint: str | None = None
        self._proof: Proof | None = None
        self.entry: Entry | None = None
        self.cache_state: tuple[str, str] | None = None
        self.predicted_bytes: int | None = None
        self.files: Files | None = None  # what is streamed, and how
        self.feed: LayerFeed | None = None
        self._dtype = dtype
        self._wanted_attention = attention
        self._cache = cache
        self._require_warm = require_warm
        self.stock_attention = "eager"  # what it is, once loaded
        self._probed = False
        self.stage: Stage | None = None
        if sizing.stages > 1 and attention == "auto" and not takes_ours(on_meta(config)):
            self.attention = "sdpa"
        self._warmed: WarmEngine | None = None
        self._precompiled: Engine | None = None  # compiled while weights were read
        self._capacity_in_passes = 0  # passes that a streamed engine expects at most
        self._same_shapes = False
        self._before: Plan | None = None  # whose shapes the next plan takes over
        self._ahead: tuple[int, int] | None = None  # lengths that plans are made for, known before the data

    def remark(self, note: str) -> None:
        """Adds what a reader of the result has to know of how it ran."""
        self.note = f"{self.note}; {note}" if self.note else note

    def shapes(
        self, longest: int, answer: int, fit: bool, sizing: Sizing | None = None, shared: int = 0
    ) -> tuple[Geometry, DecodeShape | None]:
        """The largest bucket's shape, and what decodes beside it; with `fit`, shapes that memory holds.

        Args:
            longest: inputs of the longest sequence.
            answer: tokens of the longest prompt and its answer together; 0 where nothing is decoded.
            fit: hold the shapes against the memory there is.
            sizing: another than this runtime's.
            shared: tokens that questions side by side typically share.

        Raises:
            UserError: nothing fits, or trees of this length are not exact.
        """
        self._check_rope(longest, answer)
        recorded = self._cache.recorded(self._facts()) if self._cache is not None else {}
        recorded = self.ranks.broadcast({name: recorded.get(name) or () for name in ("tuned", "geometries")})
        sizing = sizing or self.sizing
        geometry = sizing.geometry(longest, blocks=self.attention == "flex", recorded=recorded, shared=shared)
        if fit:
            geometry = sizing.fitting(geometry, longest, self.engine, answer)
        return geometry, sizing.decoding(geometry, self.engine, answer, fit)

    def plan(self, sequences: Sequences, fit: bool, new_tokens: int = 0, sizing: Sizing | None = None) -> Plan:
        """The plan for these sequences.

        Args:
            sequences: at least one.
            fit, sizing: see `shapes`.
            new_tokens: the most tokens of an answer; 0 where nothing is decoded.

        Raises:
            UserError: see `shapes`.
        """
        answer = sequences.longest_prompt + new_tokens if new_tokens else 0
        longest = int(sequences.input_lengths.max())
        order = sort_sequences(sequences)
        if self.sizing.stages > 1 and not self.sizing.shares:
            readouts = min(1.0, int(sequences.predicted.sum()) / order.prefix_tree_tokens)
            self.sizing.divide(readouts, longest, self.engine, self.attention == "flex", fit)
        ahead = None if self._ahead is None or sizing is not None else self.shapes(*self._ahead, fit=True)
        if ahead is not None and not _hold(*ahead, longest, answer):
            ahead = None
        before = self._before if sizing is None and ahead is None else None
        if before is not None and _hold(before.geometry, before.decoding, longest, answer):
            geometry, decoding, known = before.geometry, before.decoding, before.buckets
        else:
            shared, known = order.typically_shared(sequences), ()
            geometry, decoding = ahead or self.shapes(longest, answer, fit, sizing, shared)
        boundary = boundary_of(self.config)
        plan = make_plan(
            sequences, geometry, all_buckets=ahead is not None, order=order, buckets=known, boundary=boundary
        )
        plan = replace(plan, decoding=decoding)
        if self._same_shapes and sizing is None and ahead is None:
            self._before = plan = with_room(plan, known)
        held = device_memory.used_already(self.device) if self.model is None else 0
        self.predicted_bytes = self.budget(plan).total + held
        return plan

    @contextmanager
    def same_shapes(self) -> Iterator[None]:
        """While this lasts, a plan takes over the shapes of the one before it, if they hold its sequences."""
        self._same_shapes = True
        try:
            yield
        finally:
            self._same_shapes, self._before = False, None

    def plan_ahead(self, longest: int, answer: int) -> None:
        """From now on plans for up to these lengths (see `shapes`) all have the same buckets."""
        self._ahead = longest, answer

    def budget(self, plan: Plan | Totals) -> memory.Budget:
        """What a run of this plan needs, in bytes by part.

        Of several stages of a pipeline it is the one that needs most.
        """
        passes = 1 if self.sizing.streamed is None else self.passes_at_once(plan, _in_a_window(plan))
        return self.sizing.budget(_largest(plan), self.engine, plan.decoding, passes)

    def stages(self, plan: Plan | Totals) -> list[dict[str, Any]] | None:
        """`plan --json`'s `stages`: of each its layers, from the first to before the last, and the bytes it needs."""
        if not self.sizing.shares:
            return None
        budgets = self.sizing.budgets(_largest(plan), self.engine, plan.decoding)
        return [
            {"layers": [share.first, share.last], "weights_bytes": one.weights, "total_bytes": one.total}
            for share, one in zip(self.sizing.shares, budgets, strict=True)
        ]

    @property
    def share(self) -> LayerRange | None:
        """What this rank holds of the model, once planned; None is all."""
        return self.sizing.shares[self.ranks.stage] if self.sizing.shares else None

    def passes_at_once(self, plan: Plan | Totals | StagedPlan, passes: int) -> int:
        """How many of `passes` go through a streamed layer together; see `Sizing.passes_at_once`."""
        return self.sizing.passes_at_once(_largest(plan), self.engine, passes)

    def planned_streaming(self, plan: Plan | Totals) -> dict[str, int] | None:
        """As much of `streaming` as is known before a run of this plan."""
        streamed = self.sizing.streamed
        if streamed is None:
            return None
        due, windows = _in_a_window(plan), plan.windows if isinstance(plan, Totals) else 1
        passes = self.passes_at_once(plan, due)
        sweeps, size = windows * -(-due // passes), streamed.layer_bytes
        read = sweeps * streamed.layers * size
        return {"sweeps": sweeps, "passes_per_sweep": passes, "layer_bytes": size, "read_bytes": read}

    def open_cache(self) -> Entry | None:
        """Points the compiler at what was compiled before. Raises UserError where the file system refuses."""
        if self.engine != "compiled":
            return None
        if self._cache is not None:
            self.entry = self._cache.open(self._facts())
        initialise.begin(self.device)  # in the entry's directory
        return self.entry

    def look_up(self, plan: Plan) -> None:
        """Sees how much of what a plan needs is in the cache.

        Raises:
            CheckError: not all is, and it has to be.
        """
        entry = None if self._is_warm(plan.compiled) else self.open_cache()
        if entry is None:
            return
        self.cache_state = entry.state(plan.compiled)
        if self._require_warm and self.cache_state[0] != WARM:
            raise CheckError(f"{self.name}: the compile cache is {self.cache_state[0]}: {self.cache_state[1]}")

    def load(self, plan: Plan | None = None, clock: Clock | None = None) -> PreTrainedModel:
        """The model with its weights, on its device.

        Args:
            plan: what is to be warmed up for. If all of it is in the cache, compiling begins while weights are read.
            clock: in the phase `load_model`; what compiling takes longer than reading is booked as `warmup`.

        Raises:
            UserError: the checkpoint cannot be used.
        """
        if self.model is None:
            loaded = self._load_share() if self.sizing.stages > 1 else self._load(plan)
            if clock is not None and loaded.overlap is not None and loaded.overlap.read_at < loaded.overlap.made_at:
                clock.enter("warmup", loaded.overlap.read_at)
                clock.enter("load_model", loaded.overlap.made_at)
            if self.expected_fingerprint not in (None, loaded.fingerprint):
                raise UserError(
                    f"{self.name}: weights: fingerprint {loaded.fingerprint[:12]}, "
                    f"the baseline's is {str(self.expected_fingerprint)[:12]}: not the same model"
                )
            self.model, self.checkpoint = loaded.model, loaded.checkpoint
            self.stock_attention = attention_before(self.model)
            buffers, self._precompiled = ({}, None) if loaded.overlap is None else loaded.overlap.made
            self._proof = Proof(self.model, loaded, buffers)
            if self.files is not None:
                self.feed = LayerFeed(self.name, loaded, self.files, self.device)
        return self.model

    def _load(self, plan: Plan | None) -> Loaded:
        streamed = self.sizing.streamed
        if streamed is None:
            begin = functools.partial(self._begin, plan) if plan is not None and self._can_begin(plan) else None
            return load_checkpoint(self.name, self.config, self._dtype, self.device, while_reading=begin)
        self.files = Files(self.name, checkpoint_files(self.name))
        share, keep = LayerRange(0, 0, streamed.layers), worth_keeping(self.files.size, self.device)
        return load_checkpoint(self.name, self.config, self._dtype, self.device, share, keep_cached=keep)

    def _can_begin(self, plan: Plan) -> bool:
        """Whether the cache says all that would be found out on the weights before anything is compiled, and memory
        holds passes while weights are read."""
        if self.entry is None or self.cache_state is None or self.cache_state[0] != WARM:
            return False
        found = self.entry.found
        if found is None or found.attention != self.attention:
            return False
        if found.inputs_are_free is None and self.device.type == "cuda":
            return False
        return self.sizing.fits_beside_reading(_largest(plan), self.engine)

    def _begin(self, plan: Plan, model: PreTrainedModel) -> tuple[dict[str, Content], Engine | None]:
        """Compiles for the plan while the model's weights are read; beside it, what `Proof` has to know of before."""
        buffers = made_buffers(model)
        initialise.begin(self.device).join()
        warmer = EngineBuilder(
            model, attention_before(model), self.attention, self.sizing.tuning.readout_chunk, self.entry
        )
        return buffers, warmer.begin(StagedPlan(plan.geometry, plan.buckets, plan.decoding))

    def _load_share(self) -> Loaded:
        """What this rank runs, made a stage; each stage reads its own tensors, and all know what is in them."""
        share, ranks = self.share, self.ranks
        if share is None or ranks.stages != self.sizing.stages:
            raise UserError(f"--pipeline {self.sizing.stages}: needs as many processes, as torchrun starts them")
        loaded = load_checkpoint(self.name, self.config, self._dtype, self.device, share, read_all=False)
        whole = loaded.checkpoint.with_read(ranks.collect(loaded.checkpoint.read()))
        devices = ranks.gather(_identity(self.device))
        own_device = self.device.type == "cuda" and len(set(devices)) == len(devices)
        self.stage = Stage(loaded.model, share, places(ranks.stages, ranks.rank, ranks.size, own_device))
        return replace(loaded, checkpoint=whole)

    @property
    def fingerprint(self) -> str | None:
        """Of the checkpoint's tensors, once loaded."""
        return None if self.checkpoint is None else self.checkpoint.fingerprint

    def watch(self) -> None:
        """Notes what an adopted model holds, for `verify`; one that is loaded here is noted as it is loaded."""
        if self.model is not None and self.checkpoint is None:
            self._proof = Proof(self.model)

    def verify(self) -> tuple[str, str]:
        """Holds the model on the device against what was loaded, or what `watch` has noted.

        Returns:
            What that establishes, in words, and the fingerprint of what the device holds.

        Raises:
            CheckError: see `Proof.check`.
        """
        assert self.model is not None
        assert self._proof is not None
        together = dict if self.stage is None else self.ranks.collect
        verified, digest = self._proof.verified, self._proof.check(self.name, self.model, together)
        if self.files is not None:
            self.files.check_unchanged()
            verified = f"beside the layers {verified}; layers read from files unchanged since they were hashed"
        return verified, digest

    @property
    def streaming(self) -> dict[str, Any] | None:
        """results.json's `streaming`; None where all weights are in memory."""
        engine = None if self._warmed is None else self._warmed.engine
        return engine.streaming.summary() if isinstance(engine, StreamingEngine) and engine.streaming else None

    @property
    def modules(self) -> Sequence[nn.Module]:
        """What runs in place of the model's own layers, which are not loaded."""
        engine = None if self._warmed is None else self._warmed.engine
        return engine.modules if isinstance(engine, StreamingEngine) else ()

    @property
    def warm_moments(self) -> dict[str, float]:
        """When each fixed shape of the engine in use was warm, by `time.perf_counter()`."""
        return {} if self._warmed is None else self._warmed.moments

    def adopt(self, model: PreTrainedModel) -> None:
        """Takes a model that is loaded already, on this runtime's device, instead of loading one.

        Another runtime may have taken it before, which takes it back when it runs.
        """
        self.model, self.stock_attention = model, take_back(model)
        for module in compiled_parts(model):
            module._compiled_call_impl = None
        self.sizing.count_as_loaded(sum(p.numel() * p.element_size() for p in model.parameters()))

    def probe(self) -> bool:
        """Chooses the attention by a check on the loaded model; whether that is another one than planned for.

        What is compiled already was chosen so before, for this configuration on this device; and what is warm is held
        against the loaded model once more.

        Raises:
            UserError: no attention computes this model exactly.
        """
        planned = self.attention
        if self.stage is not None:  # has too little of the model; what is warm is checked all the same
            return False
        if not self._probed and self.sizing.streamed is not None:  # the warm engine is held against the stock model
            if planned == "flex" and not takes_ours(self.load()):
                self.attention = "sdpa"
            self._probed = True
        if not self._probed:
            is_warm = self.cache_state is not None and self.cache_state[0] == WARM
            known = self.entry.found if self.entry is not None and is_warm else None
            if known is None or known.attention != planned:
                self.attention, reason = choose_attention(self.load(), self._wanted_attention)
                if reason:
                    self.remark(f"attention {self.attention}, because {printable(reason, 200)}")
            self._probed = True
            if self.ranks.any(self.attention == "sdpa") and self.attention != "sdpa":
                self.attention, _ = choose_attention(self.load(), "sdpa")
                self.remark("attention sdpa, because another rank cannot do with flex")
        if self.attention != planned:
            self._before = None
        return self.attention != planned

    def engine_for(self, ready: StagedPlan, progress: Progress) -> WarmEngine | None:
        """A warm engine, the last one if it fits; None if memory ran out and a plan of smaller buckets is needed."""
        if not self._is_warm(ready.compiled, len(ready.staged)):
            if self.entry is not None:
                self.cache_state = self.entry.state(ready.compiled)
            warmed = self.warm(ready, progress)
            if warmed is None:
                return None
            self._warmed, self._capacity_in_passes, self.engine = warmed, len(ready.staged), warmed.name
            if warmed.note:
                self.remark(warmed.note)
        return self._warmed

    def warm(self, ready: StagedPlan, progress: Progress) -> WarmEngine | None:
        """A new engine, warm; None if memory ran out, on any rank, and there is a smaller bucket to try.

        Raises:
            UserError: memory ran out on the smallest.
        """
        if self._warmed is not None:  # its buffers are freed first
            self._warmed = None
            gc.collect()
        chunk = self.sizing.tuning.readout_chunk
        model, stage, gather = self.load(), self.stage, self.ranks.gather
        passes = -(-len(ready.staged) // self.ranks.size)
        passes = 1 if self.feed is None else self.passes_at_once(ready, max(1, passes))
        precompiled, self._precompiled = self._precompiled, None
        warmer = EngineBuilder(
            model,
            self.stock_attention,
            self.attention,
            chunk,
            self.entry,
            stage,
            gather,
            self.feed,
            passes,
            precompiled,
        )
        del precompiled
        slots = ready.buckets[0].slots
        warmed = None
        if self.engine == "compiled":
            initialise.begin(self.device).join()
        gc.freeze()  # capturing a graph collects garbage first: what is here already need not be looked at each time
        try:
            warmed = warmer.warm(self.engine, ready, Counter("warmup", ready.steps, progress))
        except Exception as error:
            if not device_memory.is_out_of_memory(error):
                raise
        finally:
            gc.unfreeze()
        if not self.ranks.any(warmed is None):
            return warmed
        warmed = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.sizing.step_down(ready.geometry):
            raise UserError(f"{self.name}: out of memory on {self.device} with buckets of {slots} tokens")
        self._before = None
        self.remark(f"buckets made smaller: memory ran out with {slots} tokens")
        return None

    def _is_warm(self, compiled: Sequence[Bucket | DecodeShape], passes: int = 0) -> bool:
        if self._warmed is None or self._warmed.compiled != tuple(compiled):
            return False
        return self.feed is None or passes <= self._capacity_in_passes

    def _check_rope(self, longest: int, answer: int) -> None:
        """longrope picks one set of frequencies for a whole input, by its length: what grows beyond changes them."""
        boundary = boundary_of(self.config)
        if boundary is None or max(longest, answer) <= boundary:
            return
        if answer or self.sizing.stages > 1 or self.sizing.streamed is not None:
            what = "answers" if answer else "layers in several places"
            raise UserError(
                f"{self.name}: up to {max(longest, answer)} tokens, where its longrope changes at {boundary}: "
                f"not with {what}; --engine reference runs them"
            )

    def _facts(self) -> dict[str, Any]:
        chunk = self.sizing.tuning.readout_chunk
        facts = compile_facts(self.config, self._dtype, self.device, self._wanted_attention, chunk)
        return facts | {"weights": "in memory" if self.sizing.streamed is None else "streamed"}


def _hold(geometry: Geometry, decoding: DecodeShape | None, longest: int, answer: int) -> bool:
    """Whether these shapes hold these lengths."""
    return longest <= geometry.length and (decoding is None or answer < decoding.slots)


def _identity(device: torch.device) -> str:
    """What tells a device from all others, on whatever machine."""
    about = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return str(getattr(about, "uuid", f"{device} of {platform.node()}"))


def _in_a_window(plan: Plan | Totals) -> int:
    """The passes of a plan, of several windows' on average."""
    runs = sum(plan.runs(i) for i in range(len(plan.buckets)))
    return runs if isinstance(plan, Plan) else -(-runs // plan.windows)


def _largest(plan: Plan | Totals | StagedPlan) -> Geometry:
    """The geometry of a plan's largest bucket."""
    largest = plan.buckets[0]
    return Geometry(largest.rows, largest.length, plan.geometry.readout_chunk, plan.geometry.blocks)
