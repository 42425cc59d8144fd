"""Compiling in a process of its own for a sample of the model, as where the GPU's memory is the host's."""

import pytest
import torch
import torch._inductor.config as inductor
from support.models import EXACT, tiny_model
from torch._dynamo.utils import counters

from cecompile import Question, Scorer, device
from cecompile.compile_cache.store import WARM
from cecompile.model.sample import sample_model
from cecompile.model.structure import decoder_layers, kinds_of, on_meta
from cecompile.run import compile_apart, warm_cache, warmup
from cecompile.workload.plan import Geometry
from cecompile.workload.stage import StagedPlan

CPU = torch.device("cpu")
QUESTIONS = [Question(str(i), "The bread of the town is " * (1 + i), ("warm", "not so warm"), 0) for i in range(4)]


@pytest.fixture
def unified(monkeypatch):
    """Makes every device one whose memory is the host's."""
    monkeypatch.setattr(device, "is_integrated", lambda _: True)
    with inductor.patch(compile_threads=inductor.compile_threads):  # put back afterwards
        yield


def scorer_for(model, tmp_path, **how) -> Scorer:
    return Scorer.from_pretrained(model, device="cpu", cache_dir=tmp_path / "cache", **how)


@pytest.mark.process
@pytest.mark.compiles
def test_a_run_takes_what_was_compiled_apart(tiny_llama, tmp_path, unified, monkeypatch):
    steps = []
    before = counters["inductor"]["fxgraph_cache_miss"]
    built = warm_cache.warm(scorer_for(tiny_llama, tmp_path), QUESTIONS, progress=lambda *one: steps.append(one))
    assert built.before[0] == "cold"
    assert steps.count(("warmup", 1, 1)) == 2  # apart, then with the weights
    scorer = scorer_for(tiny_llama, tmp_path)
    scores = scorer.score(QUESTIONS)
    assert counters["inductor"]["fxgraph_cache_miss"] == before  # nothing was compiled in this process
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
    assert (scorer.runtime.mode.engine, scorer.runtime.mode.note) == ("compiled", None)
    assert scorer.runtime.warmup.cache_state[0] == WARM
    monkeypatch.setattr(device, "is_integrated", lambda _: False)
    with_weights = scorer_for(tiny_llama, tmp_path / "other")
    assert with_weights.score(QUESTIONS).loglikelihoods == scores.loglikelihoods


@pytest.mark.compiles
def test_another_attention_is_planned_for_anew(tiny_llama, tmp_path, unified, monkeypatch):
    asked = []

    def found(job, done):
        asked.append((job.planned, job.ready.geometry.blocks))
        return compile_apart.Outcome("sdpa", None if job.planned == "sdpa" else "flex: logits differ")

    monkeypatch.setattr(warmup, "compile_apart", found)
    monkeypatch.setattr(warmup, "choose_attention", lambda model, wanted: ("sdpa", None))
    scorer = scorer_for(tiny_llama, tmp_path, attention="flex")
    plan = scorer.prepare(QUESTIONS, fit=True).plan
    scorer.runtime.warmup.look_up(plan)
    scorer.warm(scorer.prepare(QUESTIONS, fit=True), scorer.in_context(None))
    assert asked == [("flex", True), ("sdpa", False)]
    assert "attention sdpa, because flex: logits differ" in scorer.runtime.mode.note


@pytest.mark.process
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no g++ here >&2; exit 3", "no g++ here"),
        ("kill -9 $$", "ended by signal 9"),
        ("exit 1", "no reason given"),
    ],
)
def test_a_process_that_fails_gives_its_reason(script, reason, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(compile_apart.sys, "executable", str(python))
    ready = StagedPlan(Geometry(1, 128, 1, False), ())
    job = compile_apart.Job(None, torch.float32, CPU, "auto", "sdpa", 1, tmp_path, {}, ready)
    assert compile_apart.compile_apart(job, lambda: None) == compile_apart.Outcome("sdpa", reason)


@pytest.mark.compiles
def test_where_compiling_apart_fails_the_run_compiles(tiny_llama, tmp_path, unified, monkeypatch):
    monkeypatch.setattr(warmup, "compile_apart", lambda job, done: compile_apart.Outcome(job.planned, "no g++ here"))
    scorer = scorer_for(tiny_llama, tmp_path)
    scorer.score(QUESTIONS)
    assert scorer.runtime.mode.engine == "compiled"
    assert scorer.runtime.mode.note == "compiled beside the weights: no g++ here"


@pytest.mark.parametrize("kind", EXACT)
def test_a_sample_has_every_kind_of_layer_and_no_more_layers_than_that_takes(kind):
    whole = tiny_model(kind)
    sample = sample_model(whole.config, torch.float32, CPU)
    kinds = kinds_of(on_meta(whole.config))
    count = len(decoder_layers(sample))
    assert set(kinds_of(on_meta(sample.config))) == set(kinds)
    assert set(kinds[:count]) == set(kinds) != set(kinds[: count - 1])
    assert sample.config.vocab_size == whole.config.vocab_size
