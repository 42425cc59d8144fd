"""The same facts on a CUDA device, where buckets are captured in graphs."""

import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support.models import VOCABULARY, tiny_model
from support.passes import assert_scored_as_stock, generated, prepared, random_sequences, score
from support.rows import MADE_UP
from support.runs import results, run_process, samples
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from cecompile import Answerer, Question, Scorer, demo, read_questions
from cecompile.engine import forward
from cecompile.engine.forward import Engine
from cecompile.engine.probe import choose_attention
from cecompile.engine.reference import score_one_by_one
from cecompile.model.checkpoint import checkpoint_files, load_checkpoint, load_config
from cecompile.model.structure import LayerRange
from cecompile.partitioned.layer_feed import Files, LayerFeed
from cecompile.partitioned.streaming import StreamingEngine
from cecompile.partitioned.verify import sweep_disagreement
from cecompile.run import warmup
from cecompile.run.answerer import decode
from cecompile.run.scorer import collect
from cecompile.workload.chat_tree import prompts_of
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import choose_geometry, make_plan
from cecompile.workload.stage import stage_all

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


QUESTIONS = [Question(str(i), f"The question {i} is", ("easy", "not so easy"), 0) for i in range(50)]


def on_gpu(kind, dtype=torch.float32, **changes):
    return tiny_model(kind, head_dim=16, hidden_size=64, **changes).to("cuda", dtype)


@contextmanager
def nothing_allocated():
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    yield
    after = torch.cuda.memory_stats()
    for name in ("allocation.all.allocated", "segment.all.allocated", "allocated_bytes.all.peak"):
        assert after[name] == before[name], name


def mode_of(model) -> tuple[str, str | None, str | None]:
    mode = model.runtime.mode
    return mode.engine, mode.attention, mode.note


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "phi3", "opt"])
def test_trees_score_as_the_stock_model_does(kind, compiled, attention):
    assert_scored_as_stock(on_gpu(kind), random_sequences(questions=60), attention, compiled=compiled)


def test_auto_takes_flex_where_it_compiles():
    assert choose_attention(on_gpu("llama"), "auto") == ("flex", None)


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
def test_windows_shorter_than_a_context_of_several_tiles(attention):
    model = on_gpu("mistral", sliding_window=64, max_position_embeddings=512)
    sequences = random_sequences(3, questions=4, trunk=400)
    assert_scored_as_stock(model, sequences, attention, compiled=True, tokens=1024)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_accepts_a_deep_model_in_half_precision(dtype):
    model = on_gpu("llama", dtype, num_hidden_layers=40, initializer_range=0.1)
    assert choose_attention(model, "auto") == ("flex", None)


def test_scorer_from_end_to_end(tiny_llama):
    expected = Scorer.from_pretrained(tiny_llama, device="cuda", engine="reference").score(QUESTIONS)
    scorer = Scorer.from_pretrained(tiny_llama, device="cuda")
    got = scorer.score(QUESTIONS)
    assert mode_of(scorer) == ("compiled", "flex", None)
    np.testing.assert_allclose(got.loglikelihoods, expected.loglikelihoods, rtol=0, atol=1e-3)
    assert got.greedy == expected.greedy


def test_what_a_warm_cache_holds_is_not_tried_again_and_compiled_while_weights_are_read(
    tiny_llama, tmp_path, monkeypatch
):
    cold = Scorer.from_pretrained(tiny_llama, device="cuda", cache_dir=tmp_path)
    expected = cold.score(QUESTIONS)
    monkeypatch.setattr(forward, "inputs_are_free", None)
    monkeypatch.setattr(warmup, "choose_attention", None)
    warm = Scorer.from_pretrained(tiny_llama, device="cuda", cache_dir=tmp_path)
    got = warm.score(QUESTIONS)
    assert mode_of(warm) == ("compiled", "flex", None)
    assert warm.runtime.warmup.cache_state[0] == "warm"
    settled = [any(s.settled for s in scorer.runtime.warmup.warmed.engine._slots) for scorer in (cold, warm)]
    assert settled == [False, True]
    np.testing.assert_array_equal(got.loglikelihoods, expected.loglikelihoods)


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
def test_nothing_is_allocated_after_warm_up(attention):
    model, sequences = on_gpu("llama"), random_sequences(questions=200)
    engine, staged = prepared(model, sequences, attention, compiled=True)
    with nothing_allocated():
        first, again = (collect(len(sequences), staged, engine.run(staged))[0] for _ in range(2))
    assert (first == again).all()


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.bfloat16), ("llama", torch.float16), ("opt", torch.float16), ("phi3", torch.bfloat16)],
)
def test_half_precision_is_as_good_as_the_stock_models(kind, dtype, attention):
    """Also in small buckets, with biases in float16, and with grouped key-value heads."""
    sequences = random_sequences(questions=200)
    exact, _ = score_one_by_one(on_gpu(kind), sequences)
    model = on_gpu(kind, dtype)
    stock, _ = score_one_by_one(model, sequences)
    ours, _ = score(model, sequences, attention, compiled=True, tokens=1024)

    def error(values):
        return float(np.sqrt(np.mean((values - exact) ** 2)))

    assert error(ours) <= 1.1 * error(stock)


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3", "opt"])
def test_decodes_as_generate_does(kind, attention):
    model, random = on_gpu(kind), np.random.default_rng(1)
    prompts = [random.integers(3, VOCABULARY, n).astype(np.int32) for n in (1, 40, 7, 23, 16, 17, 9)]
    stop = generated(model, prompts[1], 12, None)[5]
    expected = [generated(model, prompt, 12, stop) for prompt in prompts]
    engine, _ = prepared(model, random_sequences(), attention, compiled=True)
    decoder = engine.decoder(DecodeShape(128, 3, (16, 3)))
    decoder.warm_up()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(2):
        assert decode(decoder, prompts, [12] * len(prompts), frozenset([stop])) == expected
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_demo_answers_equal_the_references():
    questions = [*read_questions(demo.CHAT), *MADE_UP]
    expected = Answerer.from_pretrained(device="cuda", engine="reference", new_tokens=60).answer(questions).answers
    answerer = Answerer.from_pretrained(device="cuda", new_tokens=60)
    got = answerer.answer(questions).answers
    assert mode_of(answerer) == ("compiled", "flex", None)
    assert [a.text for a in got] == [a.text for a in expected]


TINY = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
ONE_B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}


@pytest.mark.parametrize("sizes", [TINY, ONE_B | {"num_key_value_heads": 4}], ids=["tiny", "1b"])
def test_half_precision_answers_part_from_generates_only_at_near_ties(sizes, record_property):
    """Where they part, two logits are nearer to each other than two errors of the stock model can be apart."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=1024, **sizes)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    answerer = Answerer.from_model(model, tokenizer, new_tokens=40)
    questions = read_questions(demo.CHAT, limit=40)
    workload = answerer.prepare(questions)
    expected = [generated(model, prompt, 40, 2) for prompt in prompts_of(workload.sequences)]
    got = answerer.answer(questions).answers
    model.set_attn_implementation("eager")
    parted = 0
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        exact = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").to("cuda")
        exact.load_state_dict(model.state_dict())
        for prompt, theirs, ours in zip(prompts_of(workload.sequences), expected, got, strict=True):
            at = next((i for i, (a, b) in enumerate(zip(theirs, ours.token_ids, strict=False)) if a != b), None)
            if at is None:
                assert theirs == list(ours.token_ids)
                continue
            parted += 1
            ids = torch.tensor([[*prompt.tolist(), *theirs[:at]]], device="cuda")
            true, rounded = (m(ids, use_cache=False).logits[0, -1].float() for m in (exact, model))
            gap = (true[theirs[at]] - true[ours.token_ids[at]]).abs()
            error = rounded - true
            assert gap <= error.max() - error.min()  # one side's error at its token, less that at the other's
    record_property("parted", f"{parted} of {len(got)} answers part at a near tie")
    assert parted < len(got)


def streamed(directory, plan, passes, attention="flex"):
    """A warm engine whose layers are streamed, and its feed."""
    config = load_config(str(directory))
    files = Files(str(directory), checkpoint_files(str(directory)))
    share, device = LayerRange(0, 0, config.num_hidden_layers), torch.device("cuda", 0)
    loaded = load_checkpoint(str(directory), config, "auto", device, share)
    feed = LayerFeed(str(directory), loaded, files, device)
    how = {"attention": attention, "compiled": True, "readout_chunk": 64, "passes": passes}
    engine = StreamingEngine(loaded.model, plan.buckets, feed, **how)
    engine.warm_up()
    return engine, feed


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt"])
def test_streamed_layers_give_what_the_model_in_memory_gives(kind, attention, tmp_path):
    """Several sweeps through captured graphs; nothing is allocated, and nothing compiled for the second place."""
    model, sequences = on_gpu(kind, num_hidden_layers=5), random_sequences(questions=100)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    geometry = choose_geometry(64, tokens_per_bucket=512, blocks=attention == "flex", readout_chunk=64)
    plan = make_plan(sequences, geometry)
    staged = list(stage_all(plan))
    whole = Engine(model, plan.buckets, attention=attention, compiled=True, readout_chunk=64)
    whole.warm_up()
    expected = collect(len(sequences), staged, whole.run(staged))
    engine, _ = streamed(tmp_path, plan, 3, attention)
    with nothing_allocated():
        for _ in range(3):
            values, greedy = collect(len(sequences), staged, engine.run(staged))
            np.testing.assert_allclose(values, expected[0], rtol=0, atol=1e-4)
            assert (greedy == expected[1]).all()
    assert engine.streaming.sweeps == -(-len(staged) // 3) > 1
    off = sweep_disagreement(engine, engine._model, "eager", sequences, staged)
    assert off <= 1


def test_layers_arrive_before_they_are_used_and_stay_until_then(tmp_path):
    """With the device kept busy, and with the host: each layer is what its files hold when a step would read it."""
    on_gpu("llama", torch.bfloat16, num_hidden_layers=7).save_pretrained(tmp_path)
    plan = make_plan(random_sequences(), choose_geometry(64, tokens_per_bucket=512, blocks=True, readout_chunk=64))
    _, feed = streamed(tmp_path, plan, 1)
    directory = str(tmp_path)
    whole = load_checkpoint(directory, load_config(directory), "auto", torch.device("cuda", 0)).model.state_dict()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    feed.rewind()
    for number in range(28):
        views = feed.layout.views(feed.places[feed.take()])
        if number % 3 == 0:
            torch.cuda._sleep(20_000_000)
        for name, tensor in views.items():
            wrong += (tensor != whole[f"model.layers.{number % 7}.{name}"]).sum()
        feed.give_back()
        if number % 5 == 0:
            torch.cuda.synchronize()
    assert wrong.item() == 0


def test_a_model_larger_than_the_limit(tmp_path):
    """540 MB of weights within 400 MB: refused in memory, the same predictions and a peak below the limit streamed."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 16, "num_attention_heads": 8}
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.05, **sizes)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["eval", "--model", str(tmp_path / "model"), "--device", "cuda"]
    command += ["--tokens-per-bucket", "2048"]  # in 16 bits other shapes round otherwise
    limit = ["--memory-limit", "400MB"]
    for name, more in (("whole", []), ("streamed", [*limit, "--stream-weights"])):
        run_process(*command, "--output", tmp_path / name, *more)
    refused = subprocess.run([sys.executable, "-m", "cecompile", *command, *limit], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--stream-weights reads them layer by layer" in refused.stderr
    predictions = [
        [(s["id"], s["prediction"], s["prediction_norm"]) for s in samples(tmp_path / name)]
        for name in ("whole", "streamed")
    ]
    assert predictions[0] == predictions[1]
    whole, in_layers = results(tmp_path / "whole"), results(tmp_path / "streamed")
    memory = in_layers["memory"]
    assert memory["peak_bytes"] <= memory["limit_bytes"] < whole["memory"]["peak_bytes"]
    assert memory["predicted_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.1)
    assert in_layers["engine"] == whole["engine"]
