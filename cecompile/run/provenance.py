"""The parts of results.json on the model and the machine that ran."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cecompile import device as device_memory
from cecompile.engine.attention import NAMES
from cecompile.errors import UserError
from cecompile.model.structure import LayerRange, on_meta
from cecompile.model.tokenizer_digest import tokenizer_digest
from cecompile.partitioned.span import Span
from cecompile.procfs import cpu_model
from cecompile.results.write import environment
from cecompile.run.answerer import Answerer
from cecompile.run.runtime import Runtime
from cecompile.run.scorer import Scorer


def describe(scored: Scorer | Answerer) -> dict[str, Any]:
    """results.json's parts on the engine, the model and the machine that ran; all ranks call it.

    Raises:
        CheckError: see `Weights.verify`.
    """
    runtime = scored.runtime
    mode, planner, warmup, ranks = runtime.mode, runtime.planner, runtime.warmup, runtime.ranks
    shares, state = planner.sizing.needs.shares, warmup.cache_state
    cache = None if state is None else {"state": state[0], "reason": state[1]}
    facts = _model(scored)
    mine = {"passes": ranks.passes, "tokens": ranks.tokens, "devices": device_name(runtime.device)}
    rows = ranks.gather((mine, device_memory.peak(runtime.device)))
    columns = {name: [row[name] for row, _ in rows] for name in mine}
    return {
        "engine": {
            "name": mode.engine,
            "attention": None if mode.engine == "reference" else mode.attention,
            "note": mode.note,
            "choice": scored.choice and asdict(scored.choice),
        },
        "ranks": None if ranks.size == 1 else {"size": len(rows)} | columns,
        "pipeline": {"stages": len(shares), "layers": [[s.first, s.last] for s in shares]} if shares else None,
        "streaming": warmup.warmed.streaming if warmup.warmed else None,
        "model": facts,
        "cache": cache,
        "memory": {
            "limit_bytes": planner.sizing.room.limit,
            "predicted_bytes": planner.predicted_bytes,
            "peak_bytes": max(peak for _, peak in rows),
        },
        "environment": environment(device_name(runtime.device)),
    }


def _changed(runtime: Runtime) -> dict[str, Any]:
    """results.json's `model.changed`; of a pipeline, of one replica's stages together, and replaced modules of all."""
    assert runtime.weights.model is not None
    warmed = runtime.warmup.warmed
    mine = changed(runtime.weights.model, runtime.planner.share, warmed.modules if warmed else ())
    if runtime.planner.share is None:
        return mine
    parts = runtime.ranks.gather(mine)
    compiled: Counter[str] = Counter()
    for part in parts[: runtime.ranks.stages]:
        compiled.update(part["compiled"])
    replaced = dict.fromkeys(name for part in parts for name in part["replaced_modules"] or ())
    return mine | {"compiled": dict(sorted(compiled.items())), "replaced_modules": list(replaced)}


def version_facts(runtime: Runtime) -> dict[str, Any]:
    """The versions that a result depends on, by name."""
    about = environment(device_name(runtime.device))
    return {"python": about["python"], "system": about["system"], **about["versions"]}


def _model(scored: Scorer | Answerer) -> dict[str, Any]:
    runtime, model = scored.runtime, scored.runtime.weights.model
    assert model is not None  # it has just scored
    verified, device_fingerprint = runtime.weights.verify()
    return {
        "name": runtime.name,
        **kind(model if runtime.planner.share is None else on_meta(runtime.config)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "stored_dtypes": None if runtime.weights.checkpoint is None else runtime.weights.checkpoint.stored_dtypes(),
        "fingerprint": runtime.weights.fingerprint,
        "device_fingerprint": device_fingerprint,
        "verified": verified,
        "changed": _changed(runtime),
        "tokenizer_digest": tokenizer_digest(scored.tokenizer),
    }


def kind(model: PreTrainedModel) -> dict[str, Any]:
    return {"architecture": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = cpu_model()
    return f"CPU ({name})" if name else "CPU"


def changed(
    model: PreTrainedModel, share: LayerRange | None = None, in_place: Sequence[nn.Module] = ()
) -> dict[str, Any]:
    """results.json's `model.changed`: what of a live model is not the stock model's, found by walking both.

    Args:
        model: after the run.
        share: what there is of the model, in a `Span`; it is held against the same of a fresh one. None is all.
        in_place: copies of the model's layers that ran in their place; they count among the compiled.

    Returns:
        attention: the name under which the model's attention is registered, None if that is its own. compiled: how
        many modules of each class are compiled. replaced_modules: those that are of another class than in a fresh
        model of the same configuration, are not in it, are missing, or have a `forward` of their own or hooks that it
        has not; None where there is no fresh model to hold against.
    """
    compiled = Counter(type(m).__name__ for m in (*model.modules(), *in_place) if m._compiled_call_impl is not None)
    attention = model.config._attn_implementation
    return {
        "attention": attention if attention in NAMES.values() else None,
        "compiled": dict(sorted(compiled.items())),
        "replaced_modules": _replaced(model, share),
    }


def _replaced(model: PreTrainedModel, share: LayerRange | None) -> list[str] | None:
    try:
        stock = on_meta(model.config)
        if share is not None:
            stock.tie_weights()  # older versions do not on the meta device
            Span(stock, share)
        fresh = _kinds(stock)
    except UserError:
        return None
    live = _kinds(model)
    different = [name for name in dict.fromkeys((*fresh, *live)) if fresh.get(name) != live.get(name)]
    return [name or type(model).__name__ for name in different]


def _kinds(model: nn.Module) -> dict[str, Sequence[Any]]:
    """Returns, by name, each module's class and the number of changes to its behaviour."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        name: (type(module), "forward" in vars(module), *(len(getattr(module, kind)) for kind in hooks))
        for name, module in model.named_modules(remove_duplicate=False)
    }
