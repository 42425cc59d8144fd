"""The tree pass against the stock model, over architectures that differ in what attention and head do."""

import copy
import inspect
import sys
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from support.models import ARCHITECTURES, EXACT, VOCABULARY, tiny_model
from support.passes import assert_scored_as_stock, prepared, random_sequences, score
from support.waiting import HANG, wait_until
from torch._dynamo import funcname_cache
from torch._inductor.custom_graph_pass import CustomGraphPass
from transformers import AutoModelForCausalLM, AutoTokenizer, activations, modeling_utils

from cecompile import Question, Scorer, demo, read_questions
from cecompile.compile_cache.store import WARM
from cecompile.engine import attention, forward, head, initialise
from cecompile.engine.forward import Engine
from cecompile.engine.inductor_cpu import quote_paths
from cecompile.engine.parts import compile_options, one_layer_of_each_kind
from cecompile.engine.probe import choose_attention
from cecompile.engine.reference import relative_distance, rounding, score_one_by_one, spread
from cecompile.engine.verify import decoding_disagreement, disagreement
from cecompile.errors import UserError
from cecompile.model import safetensors_reader as streaming
from cecompile.model.structure import decoder_layers
from cecompile.model.unchanged import EQUAL
from cecompile.results.clock import Clock
from cecompile.results.write import plan_summary
from cecompile.run.context import RunContext
from cecompile.run.engine_builder import EngineBuilder
from cecompile.run.language_model import timed
from cecompile.run.passes import Begun
from cecompile.run.scorer import collect
from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import BLOCK, Bucket, Geometry, choose_geometry, make_plan
from cecompile.workload.stage import StagedPlan

QUESTIONS = [Question(str(i), f"The question {i} is", ("easy", "not so easy"), 0) for i in range(5)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_trees_score_as_the_stock_model_does(kind):
    model = tiny_model(kind)
    assert choose_attention(model, "auto") == ("sdpa", None)
    assert_scored_as_stock(model, random_sequences(), "sdpa")


@pytest.mark.compiles
@pytest.mark.parametrize("lengths", ["short", "long", "both"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_longrope_on_either_side_of_its_boundary(kind, lengths):
    """Also where a long choice shares its context with short ones; and the model is left as it was."""
    sequences = random_sequences(questions=30, trunk=4)
    boundary = {"short": 100, "long": 2, "both": 30}[lengths]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope |= {"factor": 4.0, "original_max_position_embeddings": boundary}
    model = tiny_model(kind, rope_parameters=rope, original_max_position_embeddings=boundary)
    long = sequences.input_lengths > boundary
    assert (long.any(), (~long).any()) == (lengths != "short", lengths != "long")
    expected, expected_greedy = score_one_by_one(model, sequences)
    for compiled in (False, *([True] if (kind, lengths) == ("phi3", "both") else [])):
        engine, staged = prepared(model, sequences, "sdpa", compiled=compiled)
        for _ in range(2):
            got, greedy = collect(len(sequences), staged, engine.run(staged))
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)
            assert (greedy == expected_greedy).all()
        model.set_attn_implementation("eager")
        with torch.compiler.set_stance("force_eager"):
            again, _ = score_one_by_one(model, sequences)
        np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("kind", ["phi", "codegen", "gptj"])
@pytest.mark.parametrize("ruled_out", ["tokens that no choice has", "tokens of choices"])
def test_tokens_that_the_head_rules_out(kind, ruled_out):
    """Their logits are minus infinity, as for rows of the vocabulary past the tokenizer's."""
    vocabulary, first = (VOCABULARY + 32, VOCABULARY) if ruled_out.startswith("tokens that") else (VOCABULARY, 80)
    model, sequences = tiny_model(kind, **EXACT[kind], vocab_size=vocabulary), random_sequences()
    model.lm_head.bias[first:] = -torch.inf
    assert choose_attention(model, "sdpa") == ("sdpa", None)
    assert rounding(model, sequences, range(4)) < 1e-3
    expected, expected_greedy = score_one_by_one(model, sequences)
    assert np.isneginf(expected).any() == (first < VOCABULARY)
    engine, staged = prepared(model, sequences, "sdpa", compiled=False)
    got, greedy = collect(len(sequences), staged, engine.run(staged))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)
    assert (greedy == expected_greedy).all()
    assert disagreement(engine.run, model, "eager", sequences, staged) <= 1
    shape = DecodeShape(128, 3, (16, 3))
    assert decoding_disagreement(engine.decoder(shape), model, "eager", sequences) <= 1


@pytest.mark.parametrize(
    ("got", "expected", "distance"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0.0),
        ([1.0, -torch.inf], [1.0, -torch.inf], 0.0),
        ([-torch.inf], [-torch.inf], 0.0),
        ([1.0, -torch.inf], [1.0, 2.0], torch.inf),
        ([1.0, 2.0], [1.0, -torch.inf], torch.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([5.0, 5.0], [5.0, 5.0], 0.0),
        ([3.0], [3.0], 0.0),
        ([0.0, 2.0, -torch.inf], [-1.0, 1.0, -torch.inf], 1.0),
    ],
)
def test_the_distance_of_logits_bears_what_a_head_rules_out(got, expected, distance):
    assert relative_distance(torch.tensor(got), torch.tensor(expected)) == pytest.approx(distance)


def test_a_row_of_nothing_but_ruled_out_tokens_has_no_spread():
    assert np.isnan(spread(torch.tensor([])))
    assert spread(torch.zeros(3)) == 1


def test_logits_that_are_not_numbers_are_at_no_distance():
    assert np.isnan(relative_distance(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize("length", [128, 384, 512, 640])
def test_dense_attention_in_strips_sees_what_the_mask_shows(length):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, length, 8)
    visible = (torch.rand(2, length, length) < 0.3).tril() | torch.eye(length, dtype=torch.bool)
    mask = attention.dense(visible, torch.float32)
    expected = (query @ key.mT / 8**0.5 + mask).softmax(dim=-1) @ value
    out, _ = attention._sdpa(torch.nn.Module(), query, key, value, mask)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 512, 1000])
def test_the_first_of_equal_maxima_wherever_it_stands(size):
    torch.manual_seed(0)
    few = torch.randint(0, 3, (50, size)).float()  # equals within a part, and in several
    logits = torch.cat([torch.randn(50, size), few, torch.full((1, size), -torch.inf)])
    highest, first = head.max_by_parts(logits)
    assert (highest[:, 0] == logits.amax(dim=1)).all()
    assert first[:, 0].tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["llama", "phi", "opt", "phi3"])
def test_compiled_layers_and_head(kind):
    """With and without biases, with fused projections, through the CPU's own linear layers."""
    assert_scored_as_stock(tiny_model(kind), random_sequences(2, questions=5), "sdpa", compiled=True)


@pytest.mark.parametrize("attention", [pytest.param("flex", marks=pytest.mark.compiles), "sdpa"])
def test_windows_shorter_than_a_context_of_several_tiles(attention):
    """A trunk of 400 tokens has tiles without a branch in them; the window hides most of those pairs."""
    model = tiny_model("mistral", head_dim=16, sliding_window=64, max_position_embeddings=512)
    assert_scored_as_stock(model, random_sequences(3, questions=2, trunk=400), attention, tokens=1024)


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_compiled_flex_with_windows_and_soft_caps(kind):
    assert_scored_as_stock(tiny_model(kind, head_dim=16), random_sequences(1, questions=5), "flex", compiled=True)


@pytest.mark.compiles
def test_scoring_again_gives_the_same_and_builds_nothing_new(tiny_llama):
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu")
    first = scorer.score(QUESTIONS)
    engine = scorer.runtime.warmup.warmed
    assert scorer.score(QUESTIONS).loglikelihoods == first.loglikelihoods
    assert scorer.runtime.warmup.warmed is engine


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])  # gemma2 has two kinds of layers
def test_a_warm_up_that_runs_one_layer_of_each_kind_compiles_all(kind):
    model, sequences = tiny_model(kind, num_hidden_layers=5), random_sequences(questions=4)
    expected, _ = score_one_by_one(model, sequences)
    engine, staged = prepared(model, sequences, "sdpa", compiled=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        got, _ = collect(len(sequences), staged, engine.run(staged))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_one_layer_of_each_kind_runs_within_the_context_alone(kind):
    model, ran = tiny_model(kind, num_hidden_layers=5), []
    for i, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    tokens = torch.arange(3, 9)[None]
    with one_layer_of_each_kind(model):
        model(tokens)
    assert ran == ([0, 1] if kind == "gemma2" else [0])
    model(tokens)
    assert ran[-5:] == [0, 1, 2, 3, 4]


def test_no_pass_is_run_to_be_thrown_away(tiny_llama, monkeypatch):
    """The check's passes are the first of each bucket; their time counts as inference, in the first repetition."""
    questions, ran, forward = read_questions(demo.HELLASWAG, limit=20), [], Engine._forward
    monkeypatch.setattr(Engine, "_forward", lambda *call: (ran.append(call[2]), forward(*call))[1])
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager", tokens_per_bucket=512)
    scores = scorer.score(questions, RunContext(repeat=3))
    plan = scores.workload.plan
    passes = sum(bucket["runs"] for bucket in plan_summary(plan)["buckets"])
    assert 2 <= len(plan.buckets) < passes
    assert len(ran) == len(plan.buckets) + 3 * passes
    assert ran[: len(plan.buckets)] == [1] * len(plan.buckets)  # no more of the head than compiles
    assert scorer.score(questions).loglikelihoods == scores.loglikelihoods
    assert len(ran) == len(plan.buckets) + 4 * passes
    ran.clear()
    again = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager", tokens_per_bucket=512)
    again.score_sequences(scores.workload.sequences)
    assert len(ran) == len(plan.buckets) + passes
    clock = Clock()
    clock.enter("inference")
    _, (first, second) = timed(lambda run, begun: begun, RunContext(clock, repeat=2), Begun((), 5.0, 1005.0))
    assert first >= 1000 > second


@pytest.mark.compiles
def test_weights_are_not_touched():
    model = tiny_model("llama")
    before = copy.deepcopy(dict(model.state_dict()))
    score(model, random_sequences(questions=5), "sdpa", compiled=True)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_wrong_mask_is_noticed(monkeypatch):
    """The probe must fail when branches see each other."""

    def causal(self, window, dtype):
        n = self._part["end"].shape[1]
        return torch.full((1, 1, n, n), -torch.inf, dtype=dtype).triu(1)

    monkeypatch.setattr(attention.TreeMasks, "_dense_mask", causal)
    with pytest.raises(UserError, match="logits differ"):
        choose_attention(tiny_model("llama"), "sdpa")


class LosesAResidual(CustomGraphPass):
    """A miscompilation: the layer's last addition gives its first operand."""

    def __call__(self, graph) -> None:
        additions = [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor]
        residuals = [n for n in additions if n.meta["val"].dim() == 3]
        if residuals:
            residuals[-1].replace_all_uses_with(residuals[-1].args[0])

    def uuid(self) -> None:
        """None: never taken from a cache, nor put into one."""


@pytest.mark.compiles
def test_a_wrong_compilation_is_found_out_and_not_used(tiny_llama, monkeypatch):
    expected = Scorer.from_pretrained(tiny_llama, device="cpu", engine="reference").score(QUESTIONS)
    monkeypatch.setattr(forward, "compile_options", lambda *_: {"post_grad_custom_pre_pass": LosesAResidual()})
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu")
    got = scorer.score(QUESTIONS)
    assert scorer.runtime.mode.engine == "eager"
    assert scorer.runtime.mode.note.startswith("ran uncompiled: the compiled pass is ")
    np.testing.assert_allclose(got.loglikelihoods, expected.loglikelihoods, rtol=0, atol=1e-3)


@pytest.mark.compiles
def test_several_take_one_loaded_model_in_turn(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    engines = ("compiled", "reference", "eager")
    scorers = [Scorer.from_model(model, tokenizer, engine=one, cache_dir=tmp_path) for one in engines]
    first = [scorer.score(QUESTIONS).loglikelihoods for scorer in scorers]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again = [scorer.score(QUESTIONS).loglikelihoods for scorer in scorers]
    assert again == first
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert [scorer.runtime.mode.engine for scorer in scorers] == list(engines)
    for one in first:
        np.testing.assert_allclose(one, first[1], rtol=0, atol=1e-3)


@pytest.mark.compiles
def test_what_is_in_the_cache_is_compiled_while_weights_are_read(tiny_llama, tmp_path, monkeypatch):
    expected = Scorer.from_pretrained(tiny_llama, device="cpu", cache_dir=tmp_path).score(QUESTIONS)
    torch._dynamo.reset()
    counts, read = torch._dynamo.utils.counters["stats"], streaming._read
    before = counts["unique_graphs"]

    is_read, perf_counter, settle = threading.Event(), time.perf_counter, Engine.settle

    def read_late(*arguments) -> None:
        wait_until(lambda: counts["unique_graphs"] > before)
        read(*arguments)

    def moment() -> float:
        now = perf_counter()
        if threading.current_thread().name.startswith("load"):  # which asks once all is read
            is_read.set()
        return now

    def settle_at_length(engine) -> None:
        settle(engine)
        is_read.wait(HANG)

    monkeypatch.setattr(streaming, "_read", read_late)
    monkeypatch.setattr(time, "perf_counter", moment)
    monkeypatch.setattr(Engine, "settle", settle_at_length)
    scorer, clock = Scorer.from_pretrained(tiny_llama, device="cpu", cache_dir=tmp_path), Clock()
    clock.enter("preprocess")
    plan = scorer.prepare(QUESTIONS, fit=True).plan
    scorer.runtime.warmup.look_up(plan)
    assert scorer.runtime.warmup.cache_state[0] == WARM
    clock.enter("load_model")
    scorer.runtime.load(plan, clock)
    graphs = counts["unique_graphs"]
    assert graphs > before + 1  # the first of them let reading begin
    clock.enter("inference")
    assert [phase for phase, *_ in clock.timeline()][-3:] == ["load_model", "warmup", "load_model"]
    got = scorer.score(QUESTIONS)
    assert counts["unique_graphs"] == graphs
    assert got.loglikelihoods == expected.loglikelihoods
    verified, held = scorer.runtime.weights.verify()
    assert (verified, held) == (EQUAL, scorer.runtime.weights.fingerprint)


def test_what_cannot_be_compiled_while_weights_are_read_is_left_for_later():
    """Flex, for a model that does not ask for attention by name."""
    model = tiny_model("falcon", alibi=False, new_decoder_architecture=False)
    ready = StagedPlan(Geometry(1, BLOCK, 64, True), (Bucket(1, BLOCK, 64),))
    warmer = EngineBuilder(model, "eager", "flex", 64, None)
    with pytest.raises(NotImplementedError):
        warmer.warm("compiled", ready, lambda _: None)
    assert warmer.begin(ready) is None


def test_how_far_rounding_moves_a_models_logits():
    model, sequences = tiny_model("llama", num_hidden_layers=4), random_sequences()
    own = model.config._attn_implementation
    single = rounding(model, sequences, [0, 1])
    half = rounding(model.to(torch.bfloat16), sequences, [0, 1])
    assert model.config._attn_implementation == own
    assert 0 <= single < 1e-4 < half < 0.2


@pytest.mark.compiles
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Dynamo reads no sources")
def test_sources_that_tracing_reads_are_read_ahead():
    sources = {}
    for way in ("traced", "ahead"):
        torch._dynamo.reset()
        funcname_cache.clearcache()
        if way == "ahead":
            initialise._read_sources()
        else:
            geometry = choose_geometry(64, tokens_per_bucket=128, blocks=False, readout_chunk=64)
            plan = make_plan(random_sequences(questions=5), geometry)
            Engine(tiny_model("llama"), plan.buckets, attention="sdpa", compiled=True, readout_chunk=64).warm_up()
        sources[way] = set(funcname_cache.cache)
    assert {modeling_utils.__file__, activations.__file__} <= sources["ahead"]
    assert activations.__file__ in sources["traced"]
    if Version(transformers.__version__) >= Version("5.23"):  # 5.6 does not trace this one
        assert modeling_utils.__file__ in sources["traced"]


def test_an_engine_made_alone_quotes_the_compilers_paths(monkeypatch):
    from torch._inductor.cpp_builder import CppBuilder

    plain = inspect.unwrap(CppBuilder.__init__)
    monkeypatch.setattr(CppBuilder, "__init__", plain)
    quote_paths.cache_clear()
    compile_options(tiny_model("llama"), inputs_free=False)
    assert inspect.unwrap(CppBuilder.__init__) is plain is not CppBuilder.__init__
    quote_paths.cache_clear()
