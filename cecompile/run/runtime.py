"""One model on one device: its planner, its weights and its warm-up, held together."""

from typing import Any

import torch
from transformers import PreTrainedModel

from cecompile.compile_cache.key import compile_facts
from cecompile.compile_cache.store import CompileCache
from cecompile.model.structure import on_meta
from cecompile.model.support import takes_ours
from cecompile.planning.bucket_size import Sizing
from cecompile.planning.planner import Mode, Planner
from cecompile.ranks import ALONE, Ranks
from cecompile.results.clock import Clock
from cecompile.run.warmup import Warmup
from cecompile.run.weights import Weights
from cecompile.workload.plan import Plan


class Runtime:
    """One model on one device, from its configuration to warm engines.

    Args:
        name: the model's, for messages; a directory or hub id.
        config: the model's configuration.
        device: the device that runs the model.
        sizing: bucket sizes, with the options of the run.
        cache: of compiled code; None does without.
        ranks: the processes that share the work; they take the same decisions.

    Attributes:
        mode: the engine and attention in use, with the reason where either is not what was asked for.
        planner: sequences to plans.
        weights: the model itself.
        warmup: plans to warm engines.
    """

    def __init__(
        self, name: str, config: Any, device: torch.device, sizing: Sizing, cache: CompileCache | None,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        self.name, self.config, self.device, self.ranks = name, config, device, ranks
        options = sizing.options

        def facts() -> dict[str, Any]:
            found = compile_facts(config, options.dtype, device, options.attention, sizing.tuning.readout_chunk)
            return found | {"weights": "in memory" if sizing.needs.streamed is None else "streamed"}

        def recorded() -> dict[str, Any]:
            return {} if cache is None else cache.recorded(facts())

        usual = "flex" if device.type == "cuda" else "sdpa"
        if options.attention == "auto" and options.pipeline > 1 and not takes_ours(on_meta(config)):
            usual = "sdpa"
        engine = "compiled" if options.engine == "auto" else options.engine  # until a plan is known
        self.mode = mode = Mode(engine, usual if options.attention == "auto" else options.attention)
        self.planner = Planner(name, config, device, mode, sizing, ranks, recorded)
        self.weights = Weights(name, config, device, self.planner, ranks)
        self.warmup = Warmup(name, device, mode, self.planner, self.weights, cache, facts, ranks)

    def load(self, plan: Plan | None = None, clock: Clock | None = None) -> PreTrainedModel:
        """The model with its weights, on its device.

        Args:
            plan: the plan to warm up for. Where the cache holds all of the plan, compiling begins beside reading.
            clock: see `Weights.load`.

        Raises:
            UserError: the checkpoint cannot be used.
        """
        model = self.weights.load(None if plan is None else self.warmup.while_reading(plan), clock)
        note, self.weights.note = self.weights.note, None
        self.mode.remark(note)
        return model
