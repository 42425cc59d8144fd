"""The same facts on a CUDA device, where buckets are captured in graphs."""

import numpy as np
import pytest
import torch
from test_engine import prepared, random_sequences, score, tiny_model

from cecompile import Question, Scorer
from cecompile.engine.probe import choose_attention
from cecompile.engine.reference import score_one_by_one
from cecompile.scorer import collect

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(kind, dtype=torch.float32, **changes):
    return tiny_model(kind, head_dim=16, hidden_size=64, **changes).to("cuda", dtype)


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "phi3", "opt"])
def test_trees_score_as_the_stock_model_does(kind, compiled, attention):
    model, sequences = on_gpu(kind), random_sequences(questions=60)
    expected, _ = score_one_by_one(model, sequences)
    got, _ = score(model, sequences, attention, compiled=compiled)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)


def test_auto_takes_flex_where_it_compiles():
    assert choose_attention(on_gpu("llama"), "auto") == ("flex", None)


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
def test_windows_shorter_than_a_context_of_several_tiles(attention):
    model = on_gpu("mistral", sliding_window=64, max_position_embeddings=512)
    sequences = random_sequences(3, questions=4, trunk=400)
    expected, _ = score_one_by_one(model, sequences)
    got, _ = score(model, sequences, attention, compiled=True, tokens=1024)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_accepts_a_deep_model_in_half_precision(dtype):
    model = on_gpu("llama", dtype, num_hidden_layers=40, initializer_range=0.1)
    assert choose_attention(model, "auto") == ("flex", None)


def test_scorer_from_end_to_end(tiny_llama):
    questions = [Question(str(i), f"The question {i} is", ("easy", "not so easy"), 0) for i in range(50)]
    expected = Scorer.from_pretrained(tiny_llama, device="cuda", engine="reference").score(questions)
    scorer = Scorer.from_pretrained(tiny_llama, device="cuda")
    got = scorer.score(questions)
    assert (scorer.runtime.engine, scorer.runtime.attention, scorer.runtime.note) == ("compiled", "flex", None)
    np.testing.assert_allclose(got.loglikelihoods, expected.loglikelihoods, rtol=0, atol=1e-3)
    assert got.greedy == expected.greedy


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
def test_nothing_is_allocated_after_warm_up(attention):
    model, sequences = on_gpu("llama"), random_sequences(questions=200)
    engine, staged = prepared(model, sequences, attention, compiled=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    first = collect(len(sequences), staged, engine.run(staged))[0]
    again = collect(len(sequences), staged, engine.run(staged))[0]
    after = torch.cuda.memory_stats()
    for name in ("allocation.all.allocated", "segment.all.allocated", "allocated_bytes.all.peak"):
        assert after[name] == before[name], name
    assert (first == again).all()


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("opt", torch.float16),
        ("phi3", torch.bfloat16),
    ],
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
