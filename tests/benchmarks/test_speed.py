"""Speed, as regression runs. Without an option everything runs once, and nothing is said about time.

    pytest tests/benchmarks --benchmark-autosave                 keep this machine's times
    pytest tests/benchmarks --benchmark-compare                  compare with the last kept ones
    pytest tests/benchmarks --ratios                             assert ratios of times, on an idle machine

Absolute times on shared machines lie, so ratios are asserted, of times taken in alternation until they settle.
"""

import copy

import pytest
import torch
from alternate import assert_at_most, timed
from support.rows import random_questions, shared_file
from transformers import LlamaConfig, LlamaForCausalLM

from cecompile import Scorer, demo, read_questions
from cecompile.engine.forward import Engine
from cecompile.engine.head import readout_of
from cecompile.engine.reference import score_one_by_one
from cecompile.workload.encode import encode, max_input_length
from cecompile.workload.plan import Geometry, make_plan
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import stage_all

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION = "flex" if DEVICE == "cuda" else "sdpa"
CHUNK = 256
GEOMETRY = Geometry(rows=4, length=512, readout_chunk=CHUNK, blocks=ATTENTION == "flex")


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    """120 questions of about HellaSwag's proportions, random tokens."""
    return random_questions(120, 0, (10, 80), vocabulary=8000)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8000, **sizes)).eval().requires_grad_(False).to(DEVICE)


@pytest.fixture(scope="module")
def plan(sequences):
    return make_plan(sequences, GEOMETRY)


def warm_engine(model, plan, compiled: bool) -> Engine:
    engine = Engine(model, plan.buckets, attention=ATTENTION, compiled=compiled, readout_chunk=CHUNK)
    engine.warm_up()
    return engine


def test_planning(benchmark, sequences):
    plan = benchmark(make_plan, sequences, GEOMETRY)
    assert plan.slots <= 1.1 * plan.useful_tokens


def test_staging(benchmark, plan):
    assert len(benchmark(lambda: list(stage_all(plan)))) == len(plan.passes)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=pytest.mark.compiles), False], ids=["compiled", "eager"])
def test_one_pass(benchmark, model, plan, compiled):
    engine = warm_engine(model, plan, compiled)
    one = next(stage_all(plan))
    assert len(benchmark(engine.run, [one])) == 1


def test_head(benchmark, model):
    readout = readout_of(model)
    hidden = torch.randn(CHUNK, model.config.hidden_size, device=DEVICE)
    target = torch.zeros(CHUNK, 4, dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        logprob, _ = benchmark(readout, hidden, target)
    assert logprob.shape == (CHUNK, 4)


def test_demo_from_questions_to_scores(benchmark):
    questions = read_questions(demo.HELLASWAG, limit=100)
    scorer = Scorer.from_pretrained(device=DEVICE, engine="eager")
    scorer.score(questions)
    assert len(benchmark.pedantic(scorer.score, (questions,), rounds=3).loglikelihoods) == 100


@pytest.mark.parametrize("data", ["demo", "hellaswag"])
def test_encoding_and_planning_take_the_time_of_a_tokenizer(data, request, benchmark, ratios):
    """At most 1.5 times as long as the bare tokenizer for every choice, for the demo and for all of HellaSwag."""
    if data == "demo":
        scorer, questions = Scorer.from_pretrained(device="cpu"), read_questions(demo.HELLASWAG)
    else:
        scorer = Scorer.from_pretrained(request.getfixturevalue("llama_tokenizer_dir"), device="cpu")
        questions = read_questions(shared_file("hellaswag_val.jsonl"))
    longest = max_input_length(scorer.runtime.config, scorer.tokenizer)
    texts = [q.context + choice for q in questions for choice in q.choices]

    def prepare():
        plan = make_plan(encode(questions, scorer.tokenizer, longest).sequences, GEOMETRY)
        assert plan.slots <= 1.1 * plan.useful_tokens

    benchmark.pedantic(prepare, rounds=3, warmup_rounds=1)
    assert_at_most(1.5, timed(prepare), timed(lambda: scorer.tokenizer(texts)), ratios)


@pytest.mark.compiles
def test_compiling_pays(model, plan, ratios):
    staged = list(stage_all(plan))
    compiled = warm_engine(model, plan, True)
    eager = warm_engine(copy.deepcopy(model), plan, False)
    assert_at_most(1.1, timed(lambda: compiled.run(staged)), timed(lambda: eager.run(staged)), ratios)


def test_packing_pays(model, plan, sequences, ratios):
    """One static pass per bucket against one sequence per choice, both uncompiled."""
    staged = list(stage_all(plan))
    engine = warm_engine(model, plan, False)
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("sdpa")
    one_by_one = timed(lambda: score_one_by_one(stock, sequences))
    assert_at_most(0.5, timed(lambda: engine.run(staged)), one_by_one, ratios)
