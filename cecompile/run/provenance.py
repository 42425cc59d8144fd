"""What results.json says of the model and the machine that ran."""

from collections import Counter
from collections.abc import Sequence
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
from cecompile.results.clock import Clock, latencies
from cecompile.results.write import environment
from cecompile.run.answerer import Answerer
from cecompile.run.runtime import Runtime
from cecompile.run.scorer import Scorer


def times(clock: Clock, inference: Sequence[float], headline: str, resumed: dict[str, Any] | None) -> dict[str, Any]:
    """What the results say of the clock, up to now. A run of which a part was done before has no headline."""
    phases = clock.phases()
    seconds = latencies(phases, inference)
    return {
        "latency_s": seconds,
        "headline": {"clock": headline, "seconds": None if resumed else seconds[headline]},
        "phases_s": phases,
        "timeline": clock.timeline(),
    }


def share(runtime: Runtime) -> dict[str, Any]:
    """This rank's part in a run."""
    ranks = runtime.ranks
    device, peak = device_name(runtime.device), device_memory.peak(runtime.device)
    return {"passes": ranks.passes, "tokens": ranks.tokens, "devices": device, "peak": peak}


def pipeline(runtime: Runtime) -> dict[str, Any] | None:
    """results.json's `pipeline`: how many stages, and the layers of each, from the first to before the last."""
    shares = runtime.sizing.shares
    return {"stages": len(shares), "layers": [[s.first, s.last] for s in shares]} if shares else None


def _changed(runtime: Runtime) -> dict[str, Any]:
    """results.json's `model.changed`; of a pipeline, of one replica's stages together, and replaced modules of all."""
    assert runtime.model is not None
    mine = changed(runtime.model, runtime.share, runtime.modules)
    if runtime.share is None:
        return mine
    parts = runtime.ranks.gather(mine)
    compiled: Counter[str] = Counter()
    for part in parts[: runtime.ranks.stages]:
        compiled.update(part["compiled"])
    replaced = dict.fromkeys(name for part in parts for name in part["replaced_modules"] or ())
    return mine | {"compiled": dict(sorted(compiled.items())), "replaced_modules": list(replaced)}


def columns(rows: Sequence[dict[str, Any]], *without: str) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0] if name not in without}


def version_facts(runtime: Runtime) -> dict[str, Any]:
    """The versions that a result depends on, by name."""
    about = environment(device_name(runtime.device))
    return {"python": about["python"], "system": about["system"], **about["versions"]}


def model(scored: Scorer | Answerer) -> dict[str, Any]:
    """results.json's `model`. Raises CheckError: see `Runtime.verify`."""
    runtime, model = scored.runtime, scored.runtime.model
    assert model is not None  # it has just scored
    verified, device_fingerprint = runtime.verify()
    return {
        "name": runtime.name,
        **kind(model if runtime.share is None else on_meta(runtime.config)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "stored_dtypes": None if runtime.checkpoint is None else runtime.checkpoint.stored_dtypes(),
        "fingerprint": runtime.fingerprint,
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
            Span.of(stock, share)
        fresh = _kinds(stock)
    except UserError:
        return None
    live = _kinds(model)
    return [
        name or type(model).__name__ for name in dict.fromkeys((*fresh, *live)) if fresh.get(name) != live.get(name)
    ]


def _kinds(model: nn.Module) -> dict[str, Sequence[Any]]:
    """By name: each module's class, and how often what it does was changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        name: (type(module), "forward" in vars(module), *(len(getattr(module, kind)) for kind in hooks))
        for name, module in model.named_modules(remove_duplicate=False)
    }
