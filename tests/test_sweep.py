"""Streamed layers give what the model in memory gives, bit for bit, in memory that does not hold it."""

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import add_tokenizer
from support.models import EXACT, tiny_model
from support.passes import random_sequences
from support.runs import results, run_process, samples
from transformers import LlamaConfig, LlamaForCausalLM

from cecompile import Answerer, Question, Scorer, demo, evaluate, read_questions
from cecompile import device as device_memory
from cecompile.engine import verify as engine_verify
from cecompile.engine.forward import Engine
from cecompile.errors import CheckError, UserError
from cecompile.model.checkpoint import checkpoint_files, load_checkpoint, load_config
from cecompile.model.structure import LayerRange, kinds_of
from cecompile.partitioned import verify
from cecompile.partitioned.layer_feed import Files, LayerFeed
from cecompile.partitioned.streaming import StreamingEngine
from cecompile.planning import memory
from cecompile.planning.estimate import as_planned_on, estimate, streamed_seconds
from cecompile.planning.profiles import PROFILES
from cecompile.results.compare import compare_directories
from cecompile.results.journal import Journal
from cecompile.workload.plan import choose_geometry, make_plan
from cecompile.workload.stage import stage_all

CPU = torch.device("cpu")
QUESTIONS = [Question(str(i), f"The question {i} is", ("easy", "not so easy", "hard"), 0) for i in range(40)]
KINDS = {
    "llama": {"num_hidden_layers": 5},
    "gemma2": {"num_hidden_layers": 4},
    "opt": {"num_hidden_layers": 3},
    "gpt2": {"n_layer": 3, "num_hidden_layers": 3},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "llama, one layer": {"num_hidden_layers": 1},
}


def saved(directory: Path, name: str) -> str:
    tiny_model(name.split(",")[0], **KINDS[name]).save_pretrained(directory, max_shard_size="50KB")
    return str(directory)


def fed(directory: str, dtype: str = "auto"):
    """The model without its layers, and their feed."""
    config = load_config(directory)
    files = Files(directory, checkpoint_files(directory))
    loaded = load_checkpoint(directory, config, dtype, CPU, LayerRange(0, 0, config.num_hidden_layers))
    return loaded.model, LayerFeed(directory, loaded, files, CPU)


def planned():
    sequences = random_sequences(questions=12)
    longest = int(sequences.input_lengths.max())
    plan = make_plan(sequences, choose_geometry(longest, tokens_per_bucket=256, blocks=False, readout_chunk=64))
    return sequences, plan, list(stage_all(plan))


def in_memory(directory: str, dtype: str = "auto"):
    return load_checkpoint(directory, load_config(directory), dtype, CPU).model


def assert_equal(got, expected) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert np.array_equal(ours.logprob, theirs.logprob)
        assert np.array_equal(ours.argmax, theirs.argmax)


@pytest.mark.compiles
@pytest.mark.parametrize("name", KINDS)
def test_streamed_layers_give_what_the_model_in_memory_gives(name, tmp_path):
    directory, compiled = saved(tmp_path, name), name == "llama"
    _, plan, staged = planned()
    how = {"attention": "sdpa", "compiled": compiled, "readout_chunk": 64}
    engine = Engine(in_memory(directory), plan.buckets, **how)
    engine.warm_up()
    expected = engine.run(staged)
    model, feed = fed(directory)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    sweeping = StreamingEngine(model, plan.buckets, feed, passes=2, **how)
    sweeping.warm_up()
    for _ in range(2):
        assert_equal(sweeping.run(iter(staged)), expected)
    assert sweeping.streaming is not None
    assert sweeping.streaming.sweeps == -(-len(staged) // 2) > 1
    assert sweeping.streaming.read_bytes == sweeping.streaming.sweeps * feed.layers * feed.layer_bytes
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled anew"
    in_one = StreamingEngine(model, plan.buckets, feed, passes=len(staged), **how)
    in_one.warm_up()
    assert_equal(in_one.run(staged), expected)


def test_layers_of_two_kinds(tmp_path):
    model, _ = fed(saved(tmp_path, "gemma2"))
    assert kinds_of(model) == [0, 1, 0, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_are_converted_as_they_are_read(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("cecompile.partitioned.layer_feed.BLOCK", 4096)
    stored = torch.float32 if dtype == "bfloat16" else torch.bfloat16
    tiny_model("llama", num_hidden_layers=3).to(stored).save_pretrained(tmp_path)
    whole = in_memory(str(tmp_path), dtype).state_dict()
    _, feed = fed(str(tmp_path), dtype)
    for layers in ((0, 1, 2, 0, 1), (0,)):
        feed.rewind()
        for layer in layers:
            for name, tensor in feed.layout.views(feed.places[feed.take()]).items():
                assert torch.equal(tensor, whole[f"model.layers.{layer}.{name}"])
            feed.give_back()


@pytest.mark.parametrize("kind", ["gemma2", "opt"])
def test_held_against_the_stock_model_in_a_sweep(kind, tmp_path):
    """As far off as in memory; and a layer with another one's weights is found out."""
    directory = saved(tmp_path, kind)
    sequences, plan, staged = planned()
    how = {"attention": "sdpa", "compiled": False, "readout_chunk": 64}
    whole = in_memory(directory)
    stock = whole.config._attn_implementation
    engine = Engine(whole, plan.buckets, **how)
    model, feed = fed(directory)
    sweeping = StreamingEngine(model, plan.buckets, feed, passes=len(staged), **how)
    off = verify.sweep_disagreement(sweeping, model, stock, sequences, staged)
    assert off == pytest.approx(engine_verify.disagreement(engine.run, whole, stock, sequences, staged))
    assert off <= 1
    sweeping._kinds = [*sweeping._kinds[1:], sweeping._kinds[0]] if kind == "gemma2" else sweeping._kinds
    for module in sweeping.modules:
        next(module.parameters()).data = torch.zeros_like(next(module.parameters()))
    assert verify.sweep_disagreement(sweeping, model, stock, sequences, staged) > 1


def test_a_scorer_from_end_to_end(tiny_llama):
    expected = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager").score(QUESTIONS)
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager", stream_weights=True)
    for questions in (QUESTIONS[:3], QUESTIONS):
        got = scorer.score(questions)
        assert scorer.runtime.mode.note is None
    assert got.loglikelihoods == expected.loglikelihoods
    assert got.greedy == expected.greedy
    held = {name for name, tensor in scorer.runtime.weights.model.state_dict().items() if not tensor.is_meta}
    assert held == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    said, _ = scorer.runtime.weights.verify()
    assert said.startswith("beside the layers equal to the checkpoint; layers read from files")


SIX_KINDS = {"n_layer": 6, "num_hidden_layers": 6, "scale_attn_by_inverse_layer_idx": True}


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("deepseek_v3", EXACT["deepseek_v3"], "its layers hold different tensors"),
        ("gpt2", SIX_KINDS, "its layers are of 6 kinds"),
    ],
)
def test_models_that_cannot_be_streamed_are_refused(kind, changes, why, tmp_path):
    tiny_model(kind, **changes).config.save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    with pytest.raises(UserError, match=why):
        Scorer.from_pretrained(tmp_path, device="cpu", stream_weights=True)


def test_what_needs_the_whole_model_is_refused(tiny_llama):
    with pytest.raises(UserError, match="--engine reference"):
        Scorer.from_pretrained(tiny_llama, device="cpu", engine="reference", stream_weights=True)
    with pytest.raises(UserError, match="decoding"):
        Answerer.from_pretrained(tiny_llama, device="cpu", stream_weights=True)


@pytest.fixture
def streaming(tiny_llama, tmp_path):
    """A scorer that has streamed its layers once, and the file that holds them."""
    directory = shutil.copytree(tiny_llama, tmp_path / "model")
    scorer = Scorer.from_pretrained(directory, device="cpu", engine="eager", stream_weights=True)
    scorer.score(QUESTIONS[:3])
    return scorer, directory / "model.safetensors"


def test_a_checkpoint_that_changes_during_the_run_is_found_out(streaming):
    scorer, weights = streaming
    scorer.runtime.weights.verify()
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    with pytest.raises(CheckError, match=r"model\.safetensors changed during the run"):
        scorer.runtime.weights.verify()


def test_a_file_that_becomes_shorter_is_one_line(streaming):
    scorer, weights = streaming
    scorer.runtime.weights.feed.settle()
    os.truncate(weights, 20_000)
    scorer.score(QUESTIONS[:3])  # its two layers had been read before
    with pytest.raises(UserError, match="became shorter while it was read"):
        scorer.score(QUESTIONS[:3])


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory) -> Path:
    """A Llama of 8 layers, which take 61 MB each in float32 and half of it in its file."""
    directory = tmp_path_factory.mktemp("deep_llama")
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_hidden_layers": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=512, **sizes))
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.05, 0.05)
    model.save_pretrained(directory)
    return add_tokenizer(directory)


@pytest.mark.process
def test_a_model_that_memory_does_not_hold(deep_llama, held, tmp_path):
    """Refused before loading with a way out; streamed it runs within the limit, and says the same."""
    questions = read_questions(demo.HELLASWAG, limit=3)
    how = {"device": "cpu", "dtype": "float32", "engine": "eager", "tokens_per_bucket": 128}
    gc.collect()  # what tests before have left would be given back in between
    here = device_memory.used_already(CPU)

    def limit(room: int) -> int:  # of which a prediction may fill `room` bytes
        return int((here + room) / memory.USABLE["cpu"])

    whole = Scorer.from_pretrained(deep_llama, memory_limit=limit(350 * 10**6), **how)
    with pytest.raises(UserError, match=r"; --stream-weights reads them layer by layer$"):
        whole.prepare(questions, fit=True)
    streamed = Scorer.from_pretrained(deep_llama, memory_limit=limit(150 * 10**6), stream_weights=True, **how)
    with pytest.raises(UserError, match=r"GB are there on cpu$"):
        streamed.prepare(questions, fit=True)
    out = tmp_path / "out"
    command = ["eval", "--model", deep_llama, "--limit", 3, "--stream-weights", "--output", out]
    for option, value in {**how, "memory_limit": f"{held + 430}MB"}.items():
        command += [f"--{option.replace('_', '-')}", value]
    run_process(*command)
    written = results(out)
    used, streaming = written["memory"], written["streaming"]
    assert used["peak_bytes"] <= used["limit_bytes"]
    assert used["predicted_bytes"] == pytest.approx(used["peak_bytes"], rel=0.1)
    assert streaming["read_bytes"] == streaming["sweeps"] * 8 * streaming["layer_bytes"]
    assert written["model"]["changed"]["replaced_modules"] == []
    assert compare_directories(out, out, 0.5)["failed"] == []
    scorer = Scorer.from_pretrained(deep_llama, **how)
    expected = scorer.score(questions).loglikelihoods
    assert [tuple(sample["loglikelihoods"]) for sample in samples(out)] == expected
    assert written["model"]["fingerprint"] == scorer.runtime.weights.fingerprint


def test_an_interrupted_run_goes_on(tiny_llama, tmp_path, monkeypatch):
    how = {"engine": "eager", "stream_weights": True, "tokens_per_bucket": 128}
    whole = evaluate(Scorer.from_pretrained(tiny_llama, device="cpu", **how), QUESTIONS)
    monkeypatch.setattr("cecompile.planning.needs.Needs.passes_at_once", lambda *_: 2)
    count = 0

    def stops(phase: str, done: int, total: int) -> None:
        nonlocal count
        count += phase == "inference" and done > 0
        if count == 3:
            raise KeyboardInterrupt

    def run(**more):
        with Journal(tmp_path / "out", "progress" not in more) as journal:
            scorer = Scorer.from_pretrained(tiny_llama, device="cpu", **how)
            return evaluate(scorer, QUESTIONS, output=tmp_path / "out", journal=journal, **more)

    with pytest.raises(KeyboardInterrupt):
        run(progress=stops)
    resumed = run()
    assert resumed.results["resumed"]["passes"] >= 2
    assert resumed.samples == whole.samples


def test_plan_says_how_layers_would_be_streamed(deep_llama):
    orin = as_planned_on("orin-32gb", {"attention": "sdpa", "memory_limit": 4 * 10**8, "dtype": "auto"})
    orin = {"attention": orin["attention"], "target_device": orin["target_device"]}
    scorer = Scorer.from_pretrained(deep_llama, device="cpu", stream_weights=True, **orin)
    plan = scorer.prepare(QUESTIONS, fit=True).plan
    passes, room = len(plan.passes), orin["target_device"].room
    streaming = scorer.runtime.planner.planned_streaming(plan)
    assert streaming["passes_per_sweep"] * streaming["sweeps"] >= passes
    assert streaming["layer_bytes"] == 2 * 15_206_400
    assert streaming["read_bytes"] == streaming["sweeps"] * 8 * streaming["layer_bytes"]
    assert scorer.runtime.planner.budget(plan).total <= room < 4 * 10**8
    estimated = estimate("orin-32gb", scorer.runtime.config, plan, 120, streaming)
    assert estimated["streaming"]["verdict"].startswith("reading-bound: ")
    assert estimated["phases_s"]["inference"] >= streaming["read_bytes"] / 1.5e9
    of_memory = estimate("orin-32gb", scorer.runtime.config, plan, 120)
    assert estimated["phases_s"]["inference"] > of_memory["phases_s"]["inference"]
    long = streamed_seconds(PROFILES["orin-32gb"], streaming, 8, 1000.0)
    assert long["verdict"].startswith("hidden behind computing: ")
    assert long["inference"] == pytest.approx(1000, rel=1e-3)
