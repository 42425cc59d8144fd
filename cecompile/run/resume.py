"""The facts that a run must match to be resumed, and that ranks must match to share a run."""

import hashlib
from typing import Any

import torch

from cecompile.errors import UserError
from cecompile.results.journal import Journal
from cecompile.run.language_model import Workload
from cecompile.run.runtime import Runtime
from cecompile.workload.plan import Plan


def begin(runtime: Runtime, workload: Workload, journal: Journal | None, new_tokens: int = 0) -> None:
    """Checks that all ranks are about to do the same work, and begins the journal.

    Raises:
        UserError: a rank differs; or see `Journal.begin`; or the model was not loaded from a checkpoint, and so has no
            fingerprint to compare.
    """
    if journal is None and runtime.ranks.size == 1:
        return
    if runtime.weights.fingerprint is None:
        raise UserError(f"{runtime.name}: a model given to from_model has no fingerprint; leave out the journal")
    facts = _run_facts(runtime, workload, new_tokens)
    devices = runtime.ranks.gather(facts.pop("device"))
    runtime.ranks.all_same(facts)
    if journal is not None:
        journal.begin(facts | {"device": ", ".join(sorted(set(devices)))})
    runtime.ranks.barrier()


def _run_facts(runtime: Runtime, workload: Workload, new_tokens: int) -> dict[str, Any]:
    """The facts that the readouts of a warm model depend on, beside the data and versions."""
    model, on_cpu = runtime.weights.model, runtime.device.type == "cpu"
    assert model is not None
    sequences, tokens = workload.sequences, hashlib.sha256()
    for part in (sequences.token_ids, sequences.starts, sequences.predicted, sequences.questions):
        tokens.update(part.tobytes())
    facts = {
        "model fingerprint": runtime.weights.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "engine": runtime.mode.engine,
        "attention": None if runtime.mode.engine == "reference" else runtime.mode.attention,
        "device": runtime.device.type if on_cpu else torch.cuda.get_device_name(runtime.device),
        "threads (OMP_NUM_THREADS)": torch.get_num_threads() if on_cpu else None,
        "longest answer": new_tokens,
        "tokens": tokens.hexdigest(),
    }
    streamed = {} if runtime.weights.feed is None else {"weights": "streamed"}
    return facts | streamed | ({} if workload.plan is None else _plan_facts(workload.plan))


def _plan_facts(plan: Plan) -> dict[str, Any]:
    sha = hashlib.sha256(repr((plan.geometry, plan.buckets, plan.decoding)).encode())
    for one in plan.passes:
        sha.update(repr((one.bucket, len(one.rows))).encode())
        for row in one.rows:
            for part in (row.depth, row.end, row.position, row.choice, row.entry):
                sha.update(part.tobytes())
    shapes = [f"{plan.runs(i)} runs of {b.rows} x {b.length} tokens" for i, b in enumerate(plan.buckets)]
    return {"plan": ", ".join(shapes), "plan digest": sha.hexdigest()}
