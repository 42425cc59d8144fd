"""Estimates the time of a plan on a device, from counts and public figures; measures nothing.

A pass takes the time of its linear layers (arithmetic, or reading the weights if that is longer), of attention, of
elementwise kernels' memory traffic, of the head on the readouts, and an overhead per layer and per pass. Each other
phase has one assumed rate. The inference phase is checked against the runs in `MEASURED`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import AutoConfig

from cecompile.errors import UserError
from cecompile.model.prefetch import CACHED
from cecompile.planning.memory import STARTED, UNIFIED_RESERVE, USABLE, TargetDevice
from cecompile.planning.profiles import PROFILES, Profile
from cecompile.planning.sizes import Sizes, model_sizes
from cecompile.workload.plan import BLOCK, Bucket, Plan
from cecompile.workload.totals import Totals

VALUE = 2  # bytes of a weight or an activation in bfloat16 or float16
# Hidden-sized activations that a compiled layer moves beside its linear layers' own: two residual additions, each fused
# with the norm that follows (2 read, 2 written), the rotation of queries and keys, and attention's change of layout.
HIDDEN_MOVES = 8 + 5
ATTENTION_RATE = 0.3  # tree attention's arithmetic against the linear layers'; fitted to 4 % of a 6.7B layer on an H100
PASS_OVERHEAD = 200e-6  # seconds at host speed 1: staging, launching, collecting; an assumption

# At host speed 1. Assumptions from single runs on x86-64 servers.
START = 5.0  # seconds to import torch and transformers, booked on `load_model`; the disk reads meanwhile
CACHED_RATE = 3e9  # bytes a second that are hashed and copied to the device out of the page cache
PREPROCESS_RATE = 0.5e6  # tokens a second, before sharing: tokenise, merge, pack, stage
COMPILE = {"cold": 10.0, "warm": 2.5}  # seconds a bucket shape: the layer and the head, without and with a warm cache
WARMUP_PASSES = 3  # of each bucket: two before it is captured, one that is checked against the stock model


class Measured(NamedTuple):
    """An inference phase measured on an H100 SXM 80GB, in bfloat16 with captured passes of one bucket."""

    config: dict[str, Any]  # arguments of `AutoConfig.for_model`
    bucket: Bucket
    runs: int
    seconds: float


# HellaSwag validation with the Llama-2 tokenizer: all questions, and for Phi-3-medium the first 2,000.
MEASURED_PROFILE = "h100"
MEASURED_KEYS = 256  # see `keys_per_query`
_LLAMA = {"model_type": "llama", "vocab_size": 32_000, "num_attention_heads": 32}
_LLAMA_7B = _LLAMA | {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
_LLAMA_1B = _LLAMA | {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4,
}  # fmt: skip
_PHI3_MEDIUM = {
    "model_type": "phi3", "vocab_size": 32_064, "hidden_size": 5120, "intermediate_size": 17_920,
    "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10,
}  # fmt: skip
MEASURED = {
    "llama-7b": Measured(_LLAMA_7B, Bucket(1, 8192, 7168), 216, 37.72),
    "llama-1b": Measured(_LLAMA_1B, Bucket(1, 8192, 7168), 216, 6.81),
    "phi3-medium": Measured(_PHI3_MEDIUM, Bucket(1, 4096, 4096), 40, 7.05),
}


def keys_per_query(plan: Plan | Totals, sequences: int) -> int:
    """Keys that attention visits for a query: the longest row, or with sparse tiles the mean depth and a tile more."""
    if not plan.geometry.blocks:
        return max(b.length for b in plan.buckets)
    return -(-plan.unshared_tokens // sequences // BLOCK) * BLOCK + BLOCK


def pass_seconds(profile: Profile, sizes: Sizes, bucket: Bucket, keys: int) -> float:
    """Seconds of one pass of a bucket, `keys` for each query.

    Every matrix has one hidden-sized side. The activation on its other side is written or read by another kernel
    (attention reads q, k and v and writes its output; the activation function reads the gate and writes the product).
    So a token has as many values of such activations as there are weights for each hidden unit.
    """
    slots = bucket.slots
    weights = sizes.layer_parameters * VALUE / profile.bandwidth
    linear = max(2 * sizes.active_parameters * slots / profile.matrix_rate, weights)
    attention = 4 * sizes.layers * sizes.width * keys * slots / (ATTENTION_RATE * profile.matrix_rate)
    values = sizes.active_parameters / sizes.width + HIDDEN_MOVES * sizes.layers * sizes.width  # a token
    elementwise = VALUE * values * slots / profile.bandwidth
    logits = sizes.vocabulary * bucket.readouts
    head = 2 * sizes.width * logits / profile.matrix_rate + 2 * VALUE * logits / profile.bandwidth
    overhead = sizes.layers * profile.layer_overhead + PASS_OVERHEAD / profile.host_speed
    return linear + attention + elementwise + head + overhead


def inference_seconds(profile: Profile, sizes: Sizes, runs: Sequence[tuple[Bucket, int]], keys: int) -> float:
    """Seconds of all passes; `runs` says how often each bucket runs."""
    return sum(n * pass_seconds(profile, sizes, bucket, keys) for bucket, n in runs)


def phase_seconds(profile: Profile, sizes: Sizes, plan: Plan | Totals, sequences: int) -> dict[str, float]:
    """Seconds of each phase of a plan for `sequences` sequences; warm-up with both a cold and a warm cache.

    Libraries are imported while `prefetch` reads the checkpoint. With a warm cache, compiling overlaps loading.
    """
    keys = keys_per_query(plan, sequences)
    settle = sum(WARMUP_PASSES * pass_seconds(profile, sizes, bucket, keys) for bucket in plan.buckets)
    compiling = {state: len(plan.buckets) * seconds / profile.host_speed for state, seconds in COMPILE.items()}
    runs = [(bucket, plan.runs(i)) for i, bucket in enumerate(plan.buckets)]
    stored, start = sizes.parameters * sizes.itemsize, START / profile.host_speed
    ahead = start if stored <= CACHED * profile.memory else 0.0
    loading = max(stored / profile.storage_rate - ahead, stored / (CACHED_RATE * profile.host_speed))
    return {
        "load_model": start + loading,
        "preprocess": plan.unshared_tokens / PREPROCESS_RATE / profile.host_speed,
        "warmup_cold": compiling["cold"] + settle,
        "warmup_warm": max(0.0, compiling["warm"] - loading) + settle,
        "inference": inference_seconds(profile, sizes, runs, keys),
    }


def model_error() -> float:
    """The largest deviation of the estimated inference phase from a measured one, relative to the measured one."""
    profile, deviations = PROFILES[MEASURED_PROFILE], []
    for config, bucket, runs, seconds in MEASURED.values():
        sizes = model_sizes(AutoConfig.for_model(**config), "bfloat16")
        deviations.append(abs(inference_seconds(profile, sizes, [(bucket, runs)], MEASURED_KEYS) / seconds - 1))
    return max(deviations)


def streamed_seconds(profile: Profile, streaming: dict[str, int], layers: int, inference: float) -> dict[str, Any]:
    """The inference phase with streamed layers, from the phase's seconds with all weights in memory.

    Returns:
        read_s, compute_s: seconds to read a layer, and to compute a layer for the passes of a sweep. inference: seconds
        of the phase. verdict: whether the run waits for reading or for computing.
    """
    read, steps = streaming["layer_bytes"] / profile.storage_rate, streaming["sweeps"] * layers
    compute = inference / steps
    passes = streaming["passes_per_sweep"]
    shown = f"a layer is read in {read:.2f} s and computes up to {passes} passes in {compute:.2f} s"
    verdict = f"hidden behind computing: {shown}" if read <= compute else f"reading-bound: {shown}"
    return {"read_s": read, "compute_s": compute, "inference": read + steps * max(read, compute), "verdict": verdict}


def estimate(
    name: str, config: Any, plan: Plan | Totals, sequences: int, streaming: dict[str, int] | None = None
) -> dict[str, Any]:
    """The `estimate` in `plan --json`: seconds of each phase on a device, labelled.

    `name` is one of PROFILES. The plan is made for the device (see `as_planned_on`) and `sequences` sequences;
    `streaming` is the plan's, where layers are streamed.

    Raises:
        UserError: transformers cannot build the model.
    """
    profile, error = PROFILES[name], model_error()
    sizes = model_sizes(config, "auto" if config.dtype else "bfloat16")
    calibration = f"inference is within {100 * error:.1f} % of the {len(MEASURED)} H100 runs it was calibrated on"
    unknown = "" if name == MEASURED_PROFILE else f"; no run on {name} was measured, so its error there is not known"
    phases, streamed = phase_seconds(profile, sizes, plan, sequences), None
    if streaming is not None:
        streamed = streamed_seconds(profile, streaming, sizes.layers, phases["inference"])
        phases["inference"] = streamed.pop("inference")
    weights, fit = sizes.parameters * VALUE, weights_fit(name, sizes.parameters)
    held = {"bytes": weights, "memory_bytes": profile.memory, "fit": fit}
    if profile.unified:
        held["desktop_bytes"] = profile.memory - profile.desktop
    return {
        "profile": name,
        "device": profile.title,
        "phases_s": phases,
        "streaming": streamed,
        "model_error": error,
        "label": f"an estimate, not measured: {calibration}{unknown}; the other phases are assumed rates",
        "weights": held,
        "source": profile.source,
    }


def weights_fit(name: str, parameters: int) -> bool:
    """Whether a device's memory holds `parameters` weights, in 16 bits."""
    return parameters * VALUE < PROFILES[name].memory


def as_planned_on(name: str, how: dict[str, Any]) -> dict[str, Any]:
    """A scorer's options for making, on any machine, the plan that a device would run.

    `name` is one of PROFILES, all of which are CUDA devices. `how` has `attention`, `memory_limit` and `dtype` as the
    user gave them; other options are passed on.

    Raises:
        UserError: float32 is asked for; the profiles' figures are for 16-bit arithmetic.
    """
    if how["dtype"] == "float32":
        raise UserError("--profile: estimates are for bfloat16 and float16; leave out --dtype float32")
    attention = "flex" if how["attention"] == "auto" else how["attention"]
    profile = PROFILES[name]
    room = profile.memory - STARTED - UNIFIED_RESERVE if profile.unified else profile.memory * USABLE["cuda"]
    if how["memory_limit"] is not None:
        room = min(room, how["memory_limit"] * USABLE["cuda"])
    return how | {"attention": attention, "target_device": TargetDevice(name, "cuda", int(room))}
