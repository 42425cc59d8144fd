"""Estimates of a plan's time on a device: counted from the model, held against measured runs, labelled."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import copy_without_weights
from support.runs import run_command
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cecompile.planning.bucket_size import TUNING
from cecompile.planning.estimate import (
    MEASURED,
    inference_seconds,
    keys_per_query,
    model_error,
    pass_seconds,
    phase_seconds,
)
from cecompile.planning.profiles import PROFILES
from cecompile.planning.sizes import Sizes, model_sizes
from cecompile.workload.plan import Bucket, Geometry, Plan

# name: (weights, those in the decoder layers' matrices)
WEIGHTS = {
    "llama-7b": (6_738_415_616, 6_476_005_376),
    "llama-1b": (1_100_048_384, 968_884_224),
    "phi3-medium": (13_960_238_080, 13_631_488_000),
}
# (model, rows, length, readouts, runs, seconds of the inference phase), bfloat16 on an H100 SXM
H100_RUNS = (
    ("llama-7b", 1, 8192, 7168, 216, 37.72),
    ("llama-1b", 1, 8192, 7168, 216, 6.81),
    ("phi3-medium", 1, 4096, 4096, 40, 7.05),
)


def sizes_of(name: str) -> Sizes:
    return model_sizes(AutoConfig.for_model(**MEASURED[name].config), "bfloat16")


def test_estimates_are_near_what_was_measured_and_the_largest_deviation_is_said():
    deviations = [
        inference_seconds(PROFILES["h100"], sizes_of(name), ((Bucket(*bucket), runs),), 256) / seconds - 1
        for name, *bucket, runs, seconds in H100_RUNS
    ]
    assert deviations == pytest.approx([0.0] * 3, abs=0.2)
    assert model_error() == pytest.approx(max(map(abs, deviations)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_measured_runs_have_the_models_real_sizes(name):
    sizes = sizes_of(name)
    assert (sizes.parameters, sizes.layer_parameters) == WEIGHTS[name]
    assert sizes.active_parameters == sizes.layer_parameters


def test_sizes_are_those_of_the_linear_layers():
    smaller = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    config = AutoConfig.for_model(**MEASURED["llama-1b"].config | smaller)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    sizes = model_sizes(config, "auto")
    assert (sizes.layers, sizes.width, sizes.vocabulary) == (2, 2048, 32_000)
    assert sizes.layer_parameters == sizes.active_parameters == linear
    assert sizes.parameters == linear + 32_000 * 2048 + 5 * 2048  # the embedding once, and the norms


def test_matrices_that_are_not_linear_layers_count_too():
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=3, n_head=4)
    assert model_sizes(config, "auto").layer_parameters == 3 * 12 * 64 * 64


def test_a_token_meets_only_its_experts():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=100,
    )  # fmt: skip
    attention, router, expert = 2 * 64 * 64 + 2 * 64 * 32, 8 * 64, 3 * 64 * 96
    sizes = model_sizes(config, "auto")
    assert sizes.layer_parameters == 2 * (attention + router + 8 * expert)
    assert sizes.active_parameters == 2 * (attention + router + 2 * expert)


def test_counting_leaves_the_configuration_as_it_is():
    config = AutoConfig.for_model(**MEASURED["llama-1b"].config)
    before = config.to_dict()
    model_sizes(config, "auto")
    assert config.to_dict() == before


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.float16, 2)])
def test_checkpoint_of_32_bits_takes_twice_as_long_to_read(dtype, itemsize):
    config = AutoConfig.for_model(**MEASURED["llama-1b"].config, dtype=dtype)
    assert model_sizes(config, "auto").itemsize == itemsize


@pytest.mark.parametrize("name", PROFILES)
def test_no_pass_is_faster_than_the_device(name):
    profile, sizes = PROFILES[name], sizes_of("llama-7b")
    flops = 2 * sizes.layer_parameters * 4096 + 2 * sizes.width * sizes.vocabulary * 1024
    assert pass_seconds(profile, sizes, Bucket(1, 4096, 1024), 256) > flops / profile.peak_flops
    assert pass_seconds(profile, sizes, Bucket(1, 128, 128), 256) > 2 * sizes.layer_parameters / profile.peak_bandwidth


def test_attention_over_whole_rows_costs_more_than_over_sparse_tiles():
    def plan(blocks: bool) -> Plan:
        geometry = Geometry(1, 8192, 1024, blocks)
        return Plan(geometry, (Bucket(1, 8192, 1024),), (), 8000, 18_000, 9000, 8000)

    assert keys_per_query(plan(True), sequences=200) == 256  # 90 tokens a sequence: one tile, and one more
    assert keys_per_query(plan(True), sequences=100) == 384
    assert keys_per_query(plan(False), sequences=200) == 8192


def test_phases_follow_what_they_depend_on():
    bucket = Bucket(1, 8192, 1024)
    one = Plan(Geometry(1, 8192, 1024, True), (bucket,), (), 8000, 18_000, 9000, 8000)
    two = Plan(one.geometry, (bucket, Bucket(1, 4096, 1024)), (), 8000, 36_000, 9000, 8000)
    h100, orin, sizes = PROFILES["h100"], PROFILES["orin-32gb"], sizes_of("llama-1b")
    first, second = phase_seconds(h100, sizes, one, 200), phase_seconds(h100, sizes, two, 400)
    assert second["preprocess"] == pytest.approx(2 * first["preprocess"])
    assert second["warmup_cold"] > first["warmup_cold"] > first["warmup_warm"]
    assert second["load_model"] == first["load_model"]
    slower = phase_seconds(orin, sizes, one, 200)
    assert all(slower[phase] > first[phase] for phase in ("load_model", "preprocess", "warmup_cold", "warmup_warm"))


def plan_table(model: Path, *arguments: str) -> str:
    shown = run_command("plan", "--model", model, "--limit", 40, "--device", "cpu", *arguments)
    return " ".join(shown.split())  # cells may be wrapped


def plan_json(model: Path, *arguments: str) -> dict:
    return json.loads(plan_table(model, *arguments, "--json"))


@pytest.fixture(scope="module")
def weightless(tmp_path_factory, tiny_llama) -> Path:
    """A 70B Llama's configuration with the demo's tokenizer, and no weights."""
    directory = copy_without_weights(tiny_llama, tmp_path_factory.mktemp("weightless") / "model")
    config = json.loads((directory / "config.json").read_text())
    sizes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16"}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config | sizes))
    return directory


def test_plan_with_a_profile_is_labelled_an_estimate(weightless):
    plan = plan_json(weightless, "--profile", "orin-32gb")
    estimate = plan["estimate"]
    assert estimate["profile"] == "orin-32gb"
    assert set(estimate["phases_s"]) == {"load_model", "preprocess", "warmup_cold", "warmup_warm", "inference"}
    assert all(seconds > 0 for seconds in estimate["phases_s"].values())
    assert estimate["model_error"] == model_error()
    assert "an estimate, not measured" in estimate["label"]
    assert "no run on orin-32gb was measured" in estimate["label"]
    assert estimate["weights"]["desktop_bytes"] == PROFILES["orin-32gb"].memory - 1.5e9
    shown = plan_table(weightless, "--profile", "orin-32gb")
    assert "estimate on orin-32gb" in shown
    assert "29.4 GB" in shown
    assert "an estimate, not measured" in shown


def test_weights_that_do_not_fit_are_said_so(weightless, tiny_llama):
    weights = plan_json(weightless, "--profile", "h100")["estimate"]["weights"]
    assert weights["bytes"] > 130e9
    assert weights["fit"] is False
    assert "DO NOT FIT" in plan_table(weightless, "--profile", "h100")
    assert "DO NOT FIT" not in plan_table(tiny_llama, "--profile", "h100")


def test_memory_is_that_of_the_device_planned_for_whatever_this_one_has(weightless, tmp_path):
    """On a CPU, with limits that leave room for little but the weights, and with one past all that there is."""
    shutil.copytree(weightless, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))  # of 1.75 GB
    slots = {}
    for limit in (2.1, 2.5, 4000.0):
        plan = plan_json(tmp_path, "--limit", "320", "--profile", "h100", "--memory-limit", f"{limit}GB")
        assert plan["memory"]["total"] <= limit * 1e9
        slots[limit] = max(b["rows"] * b["length"] for b in plan["buckets"])
    assert slots[2.1] < slots[2.5] < slots[4000.0] == TUNING["cuda"].tokens_per_bucket
    command = ("plan", "--model", tmp_path, "--device", "cpu", "--profile", "h100", "--memory-limit", "1.5GB")
    assert "1.5 GB are there on h100" in run_command(*command, exit_code=2)


def test_plan_without_a_profile_has_no_estimate(weightless):
    assert "estimate" not in plan_json(weightless)
    assert "estimate" not in plan_table(weightless)


def test_profiles_are_for_16_bits(weightless):
    command = ("plan", "--model", weightless, "--profile", "h100", "--dtype", "float32")
    assert "float32" in run_command(*command, exit_code=2)
