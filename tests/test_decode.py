"""Decoding of many rows over one cache: the host's schedule, and the steps against `generate`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import ARCHITECTURES, VOCABULARY, tiny_model
from support.passes import generated, prepared, random_sequences

from cecompile.planning.bucket_size import Sizing
from cecompile.planning.options import RunOptions
from cecompile.run.answerer import decode
from cecompile.workload.decode_schedule import DecodeSchedule, DecodeShape

# How the host runs a decoder: a cache that holds tokens instead of keys, and a next token made of all that is seen.


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 12)), max_size=12),
    st.integers(1, 4),
    st.integers(0, 60),
    st.lists(st.integers(0, 9), max_size=20),
)
def test_lanes_show_every_row_its_own_tokens_only(rows, lanes, spare, beginning):
    prompts = [np.array(beginning + prompt, dtype=np.int32) for prompt, _ in rows]
    room = [most for _, most in rows]

    def follow(seen):
        return (sum((i + 1) * t for i, t in enumerate(seen)) + len(seen)) % 10

    least = max((len(p) + r for p, r in zip(prompts, room, strict=True)), default=1)
    shape = DecodeShape(least + spare, lanes, (8, lanes))
    table = DecodeSchedule(prompts, room, frozenset([7]), shape)
    cache = np.full(shape.slots, -1)
    done = []
    while (step := table.next()) is not None:
        assert 0 < len(step.token_ids) <= (8 if len(step.token_ids) > lanes else max(8, lanes))
        assert len(set(step.slot.tolist())) == len(step.slot)
        assert step.slot.max() < shape.slots - 1
        cache[step.slot] = step.token_ids
        (shared,) = step.shared
        assert shared >= len(beginning)
        own = [cache[step.first[i] + shared : step.slot[i] + 1] for i in step.read]
        seen = [[*cache[:shared].tolist(), *one.tolist()] for one in own]
        done += table.take(np.array([follow(s) for s in seen], dtype=np.int32))
    assert sorted(done) == list(range(len(rows)))
    for prompt, most, written in zip(prompts, room, table.written, strict=True):
        expected: list[int] = []
        while len(expected) < most and (not expected or expected[-1] != 7):
            expected.append(follow(prompt.tolist() + expected))
        assert written == expected


def test_a_row_larger_than_the_cache_is_refused():
    with pytest.raises(ValueError, match="12 slots in a cache of 11"):
        DecodeSchedule([np.zeros(10, dtype=np.int32)], [3], frozenset(), DecodeShape(12, 1, (4, 1)))


def random_prompts(lengths) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize(
    ("kind", "attention", "compiled"),
    [(kind, "sdpa", False) for kind in ARCHITECTURES]
    + [
        pytest.param("llama", "sdpa", True, marks=pytest.mark.compiles),
        pytest.param("mistral", "flex", True, marks=pytest.mark.compiles),
    ],
)
def test_decodes_as_generate_does(kind, attention, compiled):
    model, prompts = tiny_model(kind), random_prompts([1, 40, 7, 23, 16, 17, 9])
    stop = generated(model, prompts[1], 12, None)[5]
    expected = [generated(model, prompt, 12, stop) for prompt in prompts]
    assert min(len(tokens) for tokens in expected) <= 6
    engine, _ = prepared(model, random_sequences(questions=5), attention, compiled=compiled)
    decoder = engine.decoder(DecodeShape(128, 3, (16, 3)))
    decoder.warm_up()
    for _ in range(2):
        assert decode(decoder, prompts, [12] * len(prompts), frozenset([stop])) == expected


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "phi3"])
@pytest.mark.parametrize("shared", [1, 15, 40])
def test_decodes_rows_that_begin_alike_as_generate_does(kind, shared):
    """The beginning is read once, in as many steps as the beginning needs, and windows count from each row's place."""
    model, (beginning, *rest) = tiny_model(kind), random_prompts([shared, 1, 30, 7, 23, 2])
    prompts = [np.concatenate([beginning, one]) for one in rest]
    expected = [generated(model, prompt, 12, None) for prompt in prompts]
    engine, _ = prepared(model, random_sequences(), "sdpa", compiled=False)
    decoder = engine.decoder(DecodeShape(128, 3, (16, 3)))
    decoder.warm_up()
    assert decode(decoder, prompts, [12] * len(prompts), frozenset()) == expected


def test_without_a_graph_a_step_has_its_tokens_and_slots_alone(monkeypatch):
    model, (beginning, *rest) = tiny_model("llama"), random_prompts([10, 30, 5, 8, 20, 2])
    prompts = [np.concatenate([beginning, one]) for one in rest]
    engine, _ = prepared(model, random_sequences(), "sdpa", compiled=False)
    decoder, ran = engine.decoder(DecodeShape(256, 5, (16, 5))), []
    forward = decoder._forward

    def noted(part, used):
        ran.append((len(part["slot"]), used))
        return forward(part, used)

    monkeypatch.setattr(decoder, "_forward", noted)
    written = decode(decoder, prompts, [12] * len(prompts), frozenset())
    read = len(beginning) + sum(map(len, rest)) + sum(len(tokens) - 1 for tokens in written)  # the last is not read
    assert sum(tokens for tokens, _ in ran) == read
    assert max(used for _, used in ran) <= len(beginning) + sum(len(one) + 12 for one in rest)


@pytest.mark.parametrize("kind", ["llama", "phi3", "granite", "gemma2"])
def test_decodes_over_as_many_slots_as_a_step_has_grouped_queries(kind):
    """Two query heads share a key head, so that a step of 256 tokens asks 512 times."""
    model, prompts = tiny_model(kind), random_prompts([90, 80, 70])
    expected = [generated(model, prompt, 12, None) for prompt in prompts]
    engine, _ = prepared(model, random_sequences(), "sdpa", compiled=False)
    decoder = engine.decoder(DecodeShape(512, 3, (256, 3)))
    assert decode(decoder, prompts, [12] * len(prompts), frozenset()) == expected


@pytest.mark.parametrize("longest", [40, 200, 300])
def test_decodes_over_the_least_cache_where_memory_is_short(longest):
    """It holds the longest prompt and answer, and more slots than a step has tokens."""
    model = tiny_model("llama", max_position_embeddings=512)
    prompts = random_prompts(min(n, longest - 12) for n in (longest, 90, 90, 60, 60, 30, 30, 10))
    expected = [generated(model, prompt, 12, None) for prompt in prompts]
    sizing = Sizing("m", model.config, model.device, RunOptions(dtype="float32"))
    geometry = sizing.geometry(longest, blocks=False)
    assert sizing.step_down(geometry)
    shape = sizing.decoding(geometry, "eager", longest, fit=False)
    assert max(longest, *shape.step_tokens) < shape.slots < sizing.tuning.decoding.slots
    engine, _ = prepared(model, random_sequences(), "sdpa", compiled=False)
    decoder = engine.decoder(shape)
    decoder.warm_up()
    assert decode(decoder, prompts, [12] * len(prompts), frozenset()) == expected
