"""How long a plan would take on a device: an estimate from counts and public figures, never a measurement.

A pass takes the time of its linear layers (arithmetic, or reading the weights if that is longer), of attention, of
what elementwise kernels move through memory, of the head on the readouts, and an overhead per layer and per pass. The
other phases are one assumed rate each. `MEASURED` holds the runs that the model is held against.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cecompile.errors import UserError
from cecompile.model.prefetch import CACHED
from cecompile.model.structure import decoder_layers, on_meta
from cecompile.planning.memory import USABLE, TargetDevice
from cecompile.planning.profiles import PROFILES, Profile
from cecompile.planning.sizes import experts_used, matrices
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


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What of a model its speed depends on.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        vocabulary: rows of the head.
        layer_parameters: of the matrices of all decoder layers.
        active_parameters: those that one token meets: of the experts, as many as a token is given to.
        parameters: all of the model's, tied ones once.
        checkpoint_value: bytes of a parameter in the checkpoint.
    """

    layers: int
    hidden: int
    vocabulary: int
    layer_parameters: int
    active_parameters: int
    parameters: int
    checkpoint_value: int = VALUE


Runs = Sequence[tuple[Bucket, int]]  # each bucket, and how often it runs


@dataclass(frozen=True, slots=True)
class Measured:
    """An inference phase that was measured on an H100 SXM 80GB, in bfloat16 with captured passes.

    Attributes:
        sizes: of the model.
        runs: the plan's.
        keys: keys that attention visits a query (see `keys_per_query`).
        seconds: measured.
    """

    sizes: ModelSizes
    runs: Runs
    keys: int
    seconds: float


# HellaSwag validation with the Llama-2 tokenizer: all of it, then the first 2,000 questions.
MEASURED_PROFILE = "h100"
MEASURED = {
    "llama-7b": Measured(
        ModelSizes(32, 4096, 32_000, 6_476_005_376, 6_476_005_376, 6_738_415_616),
        ((Bucket(1, 8192, 7168), 216),),
        256,
        37.72,
    ),
    "llama-1b": Measured(
        ModelSizes(22, 2048, 32_000, 968_884_224, 968_884_224, 1_100_048_384),
        ((Bucket(1, 8192, 7168), 216),),
        256,
        6.81,
    ),
    "phi3-medium": Measured(
        ModelSizes(40, 5120, 32_064, 13_631_488_000, 13_631_488_000, 13_960_238_080),
        ((Bucket(1, 4096, 4096), 40),),
        256,
        7.05,
    ),
}


def model_sizes(config: Any) -> ModelSizes:
    """Counts a model's parameters. Builds it on the meta device: no weight is loaded or allocated.

    Args:
        config: a transformers configuration of a causal model.

    Raises:
        UserError: transformers cannot build a causal model from it.
    """
    model = on_meta(config)
    text = config.get_text_config()
    layers, used = decoder_layers(model), experts_used(text)
    head = model.get_output_embeddings().weight
    return ModelSizes(
        layers=len(layers),
        hidden=text.hidden_size,
        vocabulary=head.shape[0],
        layer_parameters=sum(sum(matrices(layer).values()) for layer in layers),
        active_parameters=sum(sum(matrices(layer, used).values()) for layer in layers),
        parameters=sum(p.numel() for p in model.parameters()),
        checkpoint_value=(config.dtype or torch.bfloat16).itemsize,
    )


def keys_per_query(plan: Plan | Totals, sequences: int) -> int:
    """How many keys attention visits a query: of sparse tiles the mean depth's and one more, else the longest row."""
    if not plan.geometry.blocks:
        return max(b.length for b in plan.buckets)
    return -(-plan.unshared_tokens // sequences // BLOCK) * BLOCK + BLOCK


def pass_seconds(profile: Profile, sizes: ModelSizes, bucket: Bucket, keys: int) -> float:
    """One pass of a bucket.

    Each matrix has one hidden-sized side; what is on its other side is written or read by a kernel that is not its
    own (attention reads q, k and v and writes its output; the activation reads the gate and writes the product). So
    these activations are as many values a token as there are parameters for each hidden unit.
    """
    slots = bucket.slots
    weights = sizes.layer_parameters * VALUE / profile.bandwidth
    linear = max(2 * sizes.active_parameters * slots / profile.matrix_rate, weights)
    attention = 4 * sizes.layers * sizes.hidden * keys * slots / (ATTENTION_RATE * profile.matrix_rate)
    values = sizes.active_parameters / sizes.hidden + HIDDEN_MOVES * sizes.layers * sizes.hidden  # a token
    elementwise = VALUE * values * slots / profile.bandwidth
    logits = sizes.vocabulary * bucket.readouts
    head = 2 * sizes.hidden * logits / profile.matrix_rate + 2 * VALUE * logits / profile.bandwidth
    overhead = sizes.layers * profile.layer_overhead + PASS_OVERHEAD / profile.host_speed
    return linear + attention + elementwise + head + overhead


def inference_seconds(profile: Profile, sizes: ModelSizes, runs: Runs, keys: int) -> float:
    """All passes."""
    return sum(n * pass_seconds(profile, sizes, bucket, keys) for bucket, n in runs)


def phase_seconds(profile: Profile, sizes: ModelSizes, plan: Plan | Totals, sequences: int) -> dict[str, float]:
    """Seconds of each phase; of warm-up without and with a warm cache, of which a run has one.

    The checkpoint is read while libraries are imported, as `prefetch` does; and with a warm cache compiling goes on
    while it is loaded.

    Args:
        sequences: how many sequences the plan packs.
    """
    keys = keys_per_query(plan, sequences)
    settle = sum(WARMUP_PASSES * pass_seconds(profile, sizes, bucket, keys) for bucket in plan.buckets)
    compiling = {state: len(plan.buckets) * seconds / profile.host_speed for state, seconds in COMPILE.items()}
    runs = [(bucket, plan.runs(i)) for i, bucket in enumerate(plan.buckets)]
    stored, start = sizes.parameters * sizes.checkpoint_value, START / profile.host_speed
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
    """The largest deviation of the inference phase from the measured runs, relative to the measured."""
    profile = PROFILES[MEASURED_PROFILE]
    return max(abs(inference_seconds(profile, m.sizes, m.runs, m.keys) / m.seconds - 1) for m in MEASURED.values())


def streamed_seconds(profile: Profile, streaming: dict[str, int], layers: int, inference: float) -> dict[str, Any]:
    """What streaming makes of the inference phase.

    Args:
        streaming: the plan's.
        layers: of the model.
        inference: seconds of the phase with all weights in memory.

    Returns:
        read_s, compute_s: of a layer and the passes of a sweep; inference: seconds; verdict: what they wait for.
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
    """`plan --json`'s `estimate`: seconds of each phase on a device, labelled.

    Args:
        name: one of PROFILES.
        config: the model's transformers configuration.
        plan: made for the device (see `as_planned_on`).
        sequences: how many sequences it packs.
        streaming: the plan's, where layers are streamed.

    Raises:
        UserError: transformers cannot build the model.
    """
    profile, sizes, error = PROFILES[name], model_sizes(config), model_error()
    calibration = f"inference is within {100 * error:.1f} % of the {len(MEASURED)} H100 runs it was calibrated on"
    unknown = "" if name == MEASURED_PROFILE else f"; no run on {name} was measured, so its error there is not known"
    weights = sizes.parameters * VALUE
    phases, streamed = phase_seconds(profile, sizes, plan, sequences), None
    if streaming is not None:
        streamed = streamed_seconds(profile, streaming, sizes.layers, phases["inference"])
        phases["inference"] = streamed.pop("inference")
    return {
        "profile": name,
        "device": profile.title,
        "phases_s": phases,
        "streaming": streamed,
        "model_error": error,
        "label": f"an estimate, not measured: {calibration}{unknown}; the other phases are assumed rates",
        "weights": {"bytes": weights, "memory_bytes": profile.memory, "fit": weights_fit(name, sizes.parameters)},
        "source": profile.source,
    }


def weights_fit(name: str, parameters: int) -> bool:
    """Whether a device's memory holds so many weights, in 16 bits."""
    return parameters * VALUE < PROFILES[name].memory


def as_planned_on(name: str, how: dict[str, Any]) -> dict[str, Any]:
    """The options of a scorer whose plan is the one that the device would run, wherever it is made.

    Args:
        name: one of PROFILES, all of which are CUDA devices.
        how: `attention`, `memory_limit` and `dtype` as a user gave them; other options are passed on.

    Raises:
        UserError: float32 is asked for; the figures are those of 16-bit arithmetic.
    """
    if how["dtype"] == "float32":
        raise UserError("--profile: estimates are for bfloat16 and float16; leave out --dtype float32")
    attention = "flex" if how["attention"] == "auto" else how["attention"]
    profile = PROFILES[name]
    room = int(min(how["memory_limit"] or profile.memory, profile.memory) * USABLE["cuda"])
    target_device = TargetDevice(name, "cuda", room, profile.tokens_per_bucket)
    return how | {"attention": attention, "target_device": target_device}
