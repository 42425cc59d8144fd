"""The weights of a run: loaded from the checkpoint or adopted, and verified after the run."""

import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from cecompile import device as device_memory
from cecompile.engine.attention import attention_before, take_back
from cecompile.engine.forward import Engine
from cecompile.engine.parts import compiled_parts
from cecompile.errors import UserError
from cecompile.model.checkpoint import checkpoint_files, load_checkpoint
from cecompile.model.load import Loaded, tie_head
from cecompile.model.safetensors_reader import Checkpoint
from cecompile.model.structure import LayerRange
from cecompile.model.unchanged import Content, Proof
from cecompile.partitioned.layer_feed import Files, LayerFeed, worth_keeping
from cecompile.partitioned.pipeline import Stage, places
from cecompile.planning.planner import Planner
from cecompile.ranks import Ranks
from cecompile.results.clock import Clock

WhileReading = Callable[[PreTrainedModel], tuple[dict[str, Content], Engine | None]]


class Weights:
    """One model's weights on one device.

    Args:
        name: the model's, a directory or hub id.
        config: the model's configuration.
        device: the device that holds the weights.
        planner: decides which layers are loaded, and how; has the options of the run.
        ranks: the processes that share the work.

    Attributes:
        model: None until loaded.
        checkpoint: None until loaded, and for an adopted model.
        stock_attention: the model's own attention implementation, once loaded.
        stage: this rank's part of a pipeline; None where this rank runs the whole model.
        feed: reads the layers' weights, where layers are streamed.
        precompiled: the engine that was compiled while the weights were read, until an engine builder takes the engine.
        expected_fingerprint: the only fingerprint that the checkpoint may have; None allows any.
        ties_head: ties a head to the embedding where the configuration says so and the checkpoint has another head. So
            does lm-evaluation-harness; transformers' pipeline does not.
        note: says that a head was tied so, until read; None where none was.
    """

    def __init__(self, name: str, config: Any, device: torch.device, planner: Planner, ranks: Ranks) -> None:
        self.model: PreTrainedModel | None = None
        self.checkpoint: Checkpoint | None = None
        self.stock_attention = "eager"
        self.stage: Stage | None = None
        self.feed: LayerFeed | None = None
        self.precompiled: Engine | None = None
        self.expected_fingerprint: str | None = None
        self.ties_head = False
        self.note: str | None = None
        self._name, self._config, self._device, self._dtype = name, config, device, planner.sizing.options.dtype
        self._planner, self._ranks = planner, ranks
        self._files: Files | None = None
        self._proof: Proof | None = None

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the checkpoint's tensors, once loaded."""
        return None if self.checkpoint is None else self.checkpoint.fingerprint

    def load(self, while_reading: WhileReading | None = None, clock: Clock | None = None) -> PreTrainedModel:
        """The model with its weights, on its device.

        Args:
            while_reading: compiles while the weights are read; see `Warmup.while_reading`.
            clock: in the phase `load_model`. Compiling that takes longer than reading is booked as `warmup`.

        Raises:
            UserError: the checkpoint cannot be used.
        """
        if self.model is None:
            loaded = self._load_share() if self._planner.sizing.options.pipeline > 1 else self._load(while_reading)
            overlap = loaded.overlap
            if clock is not None and overlap is not None and overlap.read_at < overlap.made_at:
                clock.enter("warmup", overlap.read_at)
                clock.enter("load_model", overlap.made_at)
            found, expected = loaded.checkpoint.fingerprint, self.expected_fingerprint
            if expected is not None and found != expected:
                other = f"fingerprint {found[:12]}, the baseline's is {str(expected)[:12]}: not the same model"
                raise UserError(f"{self._name}: weights: {other}")
            if loaded.fallback is not None and self.ties_head:
                self.note = tie_head(loaded.model)
            self.model, self.checkpoint = loaded.model, loaded.checkpoint
            self._planner.loaded = True
            if device_memory.is_integrated(self._device):  # what reading took is room for the passes
                device_memory.give_back(self._device)
            self.stock_attention = attention_before(self.model)
            buffers, self.precompiled = ({}, None) if overlap is None else overlap.made
            self._proof = Proof(self.model, loaded, buffers)
            if self._files is not None:
                self.feed = LayerFeed(self._name, loaded, self._files, self._device)
        return self.model

    def adopt(self, model: PreTrainedModel) -> None:
        """Takes a model that is loaded already, on this device, instead of loading one.

        Another run that has adopted the same model adopts the model again when that run goes on.
        """
        self.model, self.stock_attention = model, take_back(model)
        self._planner.loaded = True
        for module in compiled_parts(model):
            module._compiled_call_impl = None
        self._planner.sizing.room.count_as_loaded(sum(p.numel() * p.element_size() for p in model.parameters()))

    def watch(self) -> None:
        """Records digests of an adopted model for `verify`; loading records digests of a checkpoint."""
        if self.model is not None and self.checkpoint is None:
            self._proof = Proof(self.model)

    def verify(self) -> tuple[str, str]:
        """Compares the model on the device with the digests that loading or `watch` has recorded.

        Returns:
            The claim that the comparison proves, in words, and the fingerprint of the model on the device.

        Raises:
            CheckError: see `Proof.check`.
        """
        assert self.model is not None
        assert self._proof is not None
        together = dict if self.stage is None else self._ranks.collect
        verified, digest = self._proof.verified, self._proof.check(self._name, self.model, together)
        if self._files is not None:
            self._files.check_unchanged()
            verified = f"beside the layers {verified}; layers read from files unchanged since they were hashed"
        return verified, digest

    def _load(self, while_reading: WhileReading | None) -> Loaded:
        streamed = self._planner.sizing.needs.streamed
        if streamed is None:
            return load_checkpoint(self._name, self._config, self._dtype, self._device, while_reading=while_reading)
        self._files = Files(self._name, checkpoint_files(self._name))
        share, keep = LayerRange(0, 0, streamed.layers), worth_keeping(self._files.size, self._device)
        return load_checkpoint(self._name, self._config, self._dtype, self._device, share, keep_cached=keep)

    def _load_share(self) -> Loaded:
        """Loads this rank's layers as a stage. Each stage reads its own tensors; all stages learn all digests."""
        share, ranks, stages = self._planner.share, self._ranks, self._planner.sizing.options.pipeline
        if share is None or ranks.stages != stages:
            raise UserError(f"--pipeline {stages}: needs as many processes; start {stages} by torchrun")
        loaded = load_checkpoint(self._name, self._config, self._dtype, self._device, share, read_all=False)
        whole = loaded.checkpoint.with_read(ranks.collect(loaded.checkpoint.read()))
        devices = ranks.gather(_identity(self._device))
        own_device = self._device.type == "cuda" and len(set(devices)) == len(devices)
        self.stage = Stage(loaded.model, share, places(ranks.stages, ranks.rank, ranks.size, own_device))
        return replace(loaded, checkpoint=whole)


def _identity(device: torch.device) -> str:
    """A name that no other device on any machine has."""
    about = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return str(getattr(about, "uuid", f"{device} of {platform.node()}"))
