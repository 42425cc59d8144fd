"""Layers on several ranks, one after another: the same results, and layers divided as well as can be."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import save_demo_llama, save_tiny_llama, tensors_of
from support.models import load, tiny_model
from support.passes import prepared, random_sequences
from support.rows import CHATS, MANY_ROWS, write_rows
from support.runs import results, run_command
from support.torchrun import alone, alone_and_by, command, finished, lines, same, torchrun
from torch import nn
from transformers import AutoModelForCausalLM

from cecompile import Scorer
from cecompile.cli import cli
from cecompile.engine.forward import Engine, inputs_are_free
from cecompile.errors import CheckError, UserError
from cecompile.model.checkpoint import load_config
from cecompile.model.structure import LayerRange
from cecompile.model.unchanged import EQUAL, Proof
from cecompile.partitioned.pipeline import Place, Stage
from cecompile.partitioned.span import Span
from cecompile.partitioned.verify import pipeline_disagreement
from cecompile.planning.bucket_size import Sizing
from cecompile.planning.options import RunOptions
from cecompile.planning.stages import shares, split
from cecompile.results.journal import NAME
from cecompile.run import engine_builder
from cecompile.run.engine_builder import EngineBuilder
from cecompile.run.provenance import changed
from cecompile.workload.plan import Bucket, Geometry
from cecompile.workload.stage import StagedPlan

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 5
CPU = torch.device("cpu")
EAGER = {"engine": "eager", "tokens_per_bucket": 256}
RUNS = {  # what runs, in how many stages of the four ranks
    "both": {"model": "deep", "rows": MANY_ROWS, "how": EAGER, "pipeline": 2},
    "tied": {"model": "tied", "rows": MANY_ROWS[:60], "how": EAGER, "pipeline": 4},
    "compiled": {"model": "babbler", "rows": MANY_ROWS[:16], "how": EAGER | {"engine": "compiled"}, "pipeline": 2},
    "gone on with": {"model": "deep", "rows": MANY_ROWS[:60], "how": EAGER, "pipeline": 2},
}


@pytest.fixture(scope="module")
def models(babbler, tmp_path_factory) -> dict[str, Path]:
    """Random Llamas of five layers: "deep", and "tied", whose embedding is its head; and the babbler, which has two."""
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 512}
    tied = {"tie_word_embeddings": True, "initializer_range": 0.1}
    deep = save_demo_llama(tmp_path_factory.mktemp("deep"), **sizes)
    return {"babbler": babbler, "deep": deep, "tied": save_demo_llama(tmp_path_factory.mktemp("tied"), **sizes, **tied)}


@pytest.fixture(scope="module")
def base(models, tmp_path_factory) -> list[str]:
    """`eval` of the deep model in many small passes."""
    return command(models["deep"], write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", MANY_ROWS), EAGER)


@pytest.mark.process
def test_four_ranks_in_stages_and_one_process_give_the_same(models, tmp_path):
    alone_and_by(4, tmp_path, {name: run | {"model": models[run["model"]]} for name, run in RUNS.items()})
    for name, run in RUNS.items():
        one, four = results(tmp_path / "alone" / name), results(tmp_path / name)
        bounds = [first for first, _ in four["pipeline"]["layers"]] + [LAYERS if run["how"] is EAGER else 2]
        layers = [list(pair) for pair in itertools.pairwise(bounds)]
        assert four["pipeline"] == {"stages": run["pipeline"], "layers": layers}
        assert one["pipeline"] is None
        ours, theirs = (found["model"] | {"changed": None} for found in (four, one))
        assert ours == theirs
        assert ours["verified"] == EQUAL
        assert four["model"]["changed"]["replaced_modules"] == []
        ran = [passes > 0 for passes in four["ranks"]["passes"]]
        assert not any(ran[rank] for rank in range(4) if rank % run["pipeline"] < run["pipeline"] - 1)
    compiled = results(tmp_path / "compiled")
    assert compiled["model"]["changed"]["compiled"]["LlamaDecoderLayer"] == 2
    assert compiled["cache"]["state"] == "warm"  # layers are the same whoever compiles them


@pytest.mark.process
def test_a_stage_that_is_killed_ends_the_run_which_one_process_goes_on_with(base, tmp_path):
    alone([*base, "--output", str(tmp_path / "whole")])
    output = tmp_path / "out"
    done = torchrun(2, [*base, "--pipeline", "2", "--output", str(output)], DIE_AFTER=3)
    assert done.returncode == 1
    (line,) = lines(done)
    assert "; continue with: torchrun --nproc-per-node 2 -m cecompile eval " in line
    kept = finished(output)
    assert 3 <= len(kept) < sum(bucket["runs"] for bucket in results(tmp_path / "whole")["plan"]["buckets"])
    assert not (output / NAME).exists()  # the first stage has nothing to keep
    alone([*base, "--output", str(output), "--resume"])
    assert results(output)["resumed"]["passes"] == len(kept)
    same(tmp_path / "whole", output)


@pytest.mark.parametrize(
    ("arguments", "world", "line"),
    [
        (["--pipeline", "2"], 1, "--pipeline 2: needs as many; torchrun --nproc-per-node 2 -m cecompile eval"),
        (["--pipeline", "2"], 3, "--pipeline 2: 3 processes are no multiple of it; torchrun"),
        (["--pipeline", "4"], 2, "--pipeline 4: 2 processes are no multiple of it; torchrun"),
    ],
)
def test_processes_that_are_no_pipeline_are_refused(arguments, world, line, base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", "0")
    refused = run_command(*base, *arguments, "--output", tmp_path, exit_code=2)
    assert refused.startswith(f"cecompile: {line}")
    assert refused.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(cli, [*base, *arguments, "--output", str(tmp_path)]).output == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--pipeline", "6"], f"has {LAYERS} layers"),
        (["--pipeline", "2", "--memory-limit", "9GB", "--engine", "reference"], "runs without a plan"),
        (["--pipeline", "2", "--profile", "h100"], "leave out --pipeline"),
        (["--pipeline", "2", "--memory-limit", "1MB"], "a stage of --pipeline 2: weights alone need"),
    ],
)
def test_what_cannot_be_divided_is_refused(arguments, line, base):
    plan = ["plan", *(a for a in base[1:] if a not in ("--engine", "eager"))]
    refused = run_command(*plan, *arguments, exit_code=2)
    assert line in refused
    assert refused.count("\n") == 1


def test_who_needs_all_layers_is_refused(models, tmp_path):
    chats = write_rows(tmp_path / "chats.jsonl", CHATS)
    refused = run_command("plan", "--model", str(models["deep"]), "--data", chats, "--pipeline", "2", exit_code=2)
    assert "--pipeline: chat answers" in refused
    with pytest.raises(UserError, match="reference engine runs the whole model"):
        Scorer.from_pretrained(models["deep"], device="cpu", engine="reference", pipeline=2)
    scorer = Scorer.from_pretrained(models["deep"], device="cpu", engine="eager", pipeline=2)
    with pytest.raises(UserError, match="--pipeline 2: needs as many processes"):
        scorer.score_sequences(random_sequences(questions=2))


def test_plan_shows_the_stages(base):
    plan = ["plan", *base[1:]]
    whole, divided = (json.loads(run_command(*plan, "--json", *more)) for more in ([], ["--pipeline", "2"]))
    assert whole["stages"] is None
    first, second = divided["stages"]
    assert (first["layers"][0], first["layers"][1], second["layers"][1]) == (0, second["layers"][0], LAYERS)
    norm = 64 * 4  # of the model's, which both have
    assert first["weights_bytes"] + second["weights_bytes"] == whole["memory"]["weights"] + norm
    assert divided["memory"]["total"] == max(first["total_bytes"], second["total_bytes"])
    shown = " ".join(run_command(*plan, "--pipeline", "2").split())
    assert f"layers {second['layers'][0]} to {LAYERS - 1}, 0.00 GB of weights" in shown


# ---- dividing layers


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    stages=st.integers(1, 5),
    last=st.integers(0, 12),
    room=st.integers(3, 40),
)
def test_no_division_that_fits_is_faster(layers, stages, last, room):
    def fits(stage: int, first: int, end: int) -> bool:
        return sum(layers[first:end]) + 2 * (stage == 0) <= room

    def slowest(ends) -> float:
        sums = [sum(layers[a:b]) for a, b in zip((0, *ends), ends, strict=False)]
        return max([*sums[:-1], sums[-1] + last])

    inner = itertools.combinations(range(1, len(layers)), stages - 1)
    possible = [(*ends, len(layers)) for ends in inner]
    possible = [e for e in possible if all(fits(i, a, b) for i, (a, b) in enumerate(zip((0, *e), e, strict=False)))]
    found = split(layers, stages, last, fits)
    if not possible:
        assert found is None
        return
    assert tuple(found) in possible
    assert slowest(found) == min(map(slowest, possible))
    parts = shares(found)
    assert [layer for part in parts for layer in range(part.first, part.last)] == list(range(len(layers)))
    assert [part.with_embedding for part in parts] == [True] + [False] * (stages - 1)
    assert [part.with_head for part in parts] == [False] * (stages - 1) + [True]


def test_a_head_that_costs_and_memory_that_is_short_move_layers(tmp_path):
    config = load_config(str(save_tiny_llama(tmp_path, 2000, num_hidden_layers=12)))
    sizing = Sizing("m", config, CPU, RunOptions(tokens_per_bucket=256, pipeline=2))

    def layers(readouts: float, fit: bool = False) -> list[int]:
        sizing.divide(readouts, 100, "eager", False, fit)
        return [share.last - share.first for share in sizing.needs.shares]

    assert layers(0) == [6, 6]
    few, many = layers(0.5), layers(0.9)
    assert 6 > few[1] > many[1] >= 1
    assert len(sizing.needs.budgets(Geometry(1, 256, 256, False), "eager")) == 2
    sizing.room.limit = 1 << 40
    assert layers(0.9, fit=True) == many
    needed = sizing.needs.budgets(Geometry(1, 256, 256, False), "eager")
    layer = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_config(config).model.layers[0].parameters())
    assert needed[1].total > needed[0].total + layer
    sizing.room.limit = int((needed[1].total - layer) / 0.92) + 1  # what the last stage needs with one layer less
    assert layers(0.9, fit=True) == [many[0] + 1, many[1] - 1]


# ---- in this process


ONLY = Place(None, None)


def whole_as_a_stage():
    """A model, the stage that is all of the model, the name of its attention, and sequences to run."""
    model = tiny_model("llama")
    stage = Stage(model, LayerRange(0, 2, 2), ONLY)
    return model, stage, model.config._attn_implementation, random_sequences(questions=8)


def test_a_stage_is_held_against_the_stock_model():
    model, stage, stock, sequences = whole_as_a_stage()
    plain, staged = prepared(tiny_model("llama"), sequences, "sdpa", compiled=False)
    engine = Engine(model, plain.buckets, attention="sdpa", compiled=False, readout_chunk=64, stage=stage)
    for ours, theirs in zip(engine.run(staged), plain.run(staged), strict=True):
        np.testing.assert_array_equal(ours.logprob, theirs.logprob)
    assert 0 < pipeline_disagreement(engine, stage, model, stock, sequences, staged) <= 1
    for one in staged:
        one.data[:512] = 7  # other tokens than were asked for
    assert pipeline_disagreement(engine, stage, model, stock, sequences, staged) > 1


def test_a_stage_whose_memory_does_not_suffice_for_the_check_says_so(monkeypatch):
    model, stage, stock, sequences = whole_as_a_stage()
    engine, staged = prepared(tiny_model("llama"), sequences, "sdpa", compiled=False)
    engine.stage = stage

    def out_of_memory(_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    stage.reserve(512)
    monkeypatch.setattr(stage, "_head", out_of_memory)
    assert pipeline_disagreement(engine, stage, model, stock, sequences, staged) is None


@pytest.mark.parametrize(
    ("theirs", "outcome"), [((False, "no compiler"), "ran uncompiled: no compiler"), ((True, "full"), None)]
)
def test_what_fails_in_another_stage_fails_in_all(theirs, outcome, monkeypatch):
    model, stage, stock, _ = whole_as_a_stage()
    said = iter([theirs, None])  # as it compiles, and as it does without

    def gather(mine: object) -> list:
        return [mine, 0.0 if isinstance(mine, float) else next(said)]

    warmer = EngineBuilder(model, stock, "sdpa", 64, None, stage, gather)
    ready = StagedPlan(Geometry(1, 128, 64, False), (Bucket(1, 128, 64),))
    monkeypatch.setattr(engine_builder.Engine, "warm_up", lambda *_: None)
    if outcome is None:
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            warmer.warm("compiled", ready, lambda _: None)
    else:
        warmed = warmer.warm("compiled", ready, lambda _: None)
        assert (warmed.name, warmed.note) == ("eager", outcome)


def test_layers_that_may_be_overwritten_are_found_in_a_part_too():
    for share in (LayerRange(0, 1, 2, with_head=False), LayerRange(1, 2, 2, with_embedding=False)):
        model = tiny_model("llama")
        stage = Stage(model, share, ONLY)
        assert inputs_are_free(model, stage.trial)


def in_two_parts(model: Path):
    """Which layers each of two stages has, and what each loads."""
    parts = shares([2, LAYERS])
    return parts, [load(model, share=share, read_all=False) for share in parts]


@pytest.mark.parametrize("name", ["deep", "tied"])
def test_what_is_changed_in_a_part_is_noticed(name, models):
    parts, loaded = in_two_parts(models[name])
    read = {i: digest for one in loaded for i, digest in one.checkpoint.read().items()}
    whole = load(models[name])
    for share, one in zip(parts, loaded, strict=True):
        model = one.model
        checkpoint = one.checkpoint.with_read(read)
        assert checkpoint.fingerprint == whole.checkpoint.fingerprint
        Span(model, share)
        proof = Proof(model, type(one)(model, checkpoint, sources=one.sources))
        assert proof.check("it", model) == whole.checkpoint.fingerprint
        assert changed(model, share)["replaced_modules"] == []
        model.base_model.layers[share.first].mlp.act_fn = nn.ReLU()
        assert changed(model, share)["replaced_modules"] == [f"model.layers.{share.first}.mlp.act_fn"]
        model.base_model.layers[share.first] = nn.Identity()
        replaced = changed(model, share)["replaced_modules"]
        assert any(found.startswith(f"model.layers.{share.first}") for found in replaced)
        with pytest.raises(CheckError, match=f"layers.{share.first}.* disappeared"):
            proof.check("it", model)


def test_a_tensor_that_is_no_parameters_is_read_by_the_first_stage(models, tmp_path):
    shutil.copytree(models["deep"], tmp_path, dirs_exist_ok=True)
    with tensors_of(tmp_path) as tensors:
        tensors["of.nobody"] = torch.ones(3)
    _, loaded = in_two_parts(tmp_path)
    names = [{one.checkpoint.tensors[i].name for i in one.checkpoint.read()} for one in loaded]
    assert ["of.nobody" in read for read in names] == [True, False]
    assert "model.embed_tokens.weight" in names[0] - names[1]
    assert "lm_head.weight" in names[1] - names[0]
