"""The engine that "auto" takes: by an estimate from the plan, and said with the result."""

import pytest
from support.rows import ROWS, write_rows
from support.runs import results, run_command, samples

from cecompile import Question, Scorer, demo, read_questions
from cecompile.compile_cache.key import compile_facts
from cecompile.compile_cache.store import CompileCache, ProbeResult
from cecompile.results.journal import PASSES, Journal
from cecompile.run import engine_choice
from cecompile.run.context import RunContext
from cecompile.run.engine_choice import choose_engine


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def scorer_of(model, tmp_path, **options) -> Scorer:
    return Scorer.from_pretrained(model, device="cpu", engine="auto", cache_dir=tmp_path / "cache", **options)


def planned(scorer: Scorer, questions: list[Question]):
    return scorer.prepare(questions, fit=True).plan


def test_few_questions_are_not_compiled_for_and_the_result_says_why(tiny_llama, rows, tmp_path):
    how = ("--model", tiny_llama, "--data", rows, "--device", "cpu", "--cache-dir", tmp_path / "cache")
    told = run_command("eval", *how, "--output", tmp_path / "auto")
    run_command("eval", *how, "--engine", "eager", "--output", tmp_path / "eager")
    engine, choice = (r := results(tmp_path / "auto")["engine"]), r["choice"]
    assert (engine["name"], engine["note"], choice["engine"]) == ("eager", None, "eager")
    assert choice["lacking"] == len(results(tmp_path / "auto")["plan"]["buckets"])
    assert choice["compile_s"] > choice["saved_s"] >= 0
    assert f"compiling takes {choice['compile_s']:.0f} s and saves {choice['saved_s']:.1f} s (estimates)" in told
    assert samples(tmp_path / "auto") == samples(tmp_path / "eager")
    assert results(tmp_path / "eager")["engine"]["choice"] is None
    assert not list((tmp_path / "cache").glob("*.json"))


def test_compiling_is_taken_where_it_saves_more_than_it_takes(tiny_llama, rows, tmp_path, monkeypatch):
    scorer = scorer_of(tiny_llama, tmp_path)
    plan = planned(scorer, read_questions(rows))
    few = choose_engine(scorer.runtime, plan)
    monkeypatch.setattr(engine_choice, "SAVED", 1e9)
    many = choose_engine(scorer.runtime, plan)
    assert (few.engine, many.engine) == ("eager", "compiled")
    assert few.compile_s == many.compile_s == engine_choice.LOAD + engine_choice.COMPILE * few.lacking
    assert many.saved_s > many.compile_s


def test_more_of_the_same_questions_save_more(tiny_llama, tmp_path, monkeypatch):
    """The time of a product is set, so that the machine's load does not matter."""
    times = iter(range(10**6))
    monkeypatch.setattr(engine_choice, "perf_counter", lambda: next(times))
    scorer, questions = scorer_of(tiny_llama, tmp_path), read_questions(demo.HELLASWAG)
    plans = [planned(scorer, questions[:count]) for count in (5, 300)]
    few, many = (choose_engine(scorer.runtime, plan).saved_s for plan in plans)
    slots, more = (plan.slots for plan in plans)
    assert many / few == pytest.approx(more / slots, rel=0.5)
    assert many > 3 * few


def test_shapes_in_the_cache_cost_no_compiling(tiny_llama, rows, tmp_path):
    scorer = scorer_of(tiny_llama, tmp_path)
    plan = planned(scorer, read_questions(rows))
    assert choose_engine(scorer.runtime, plan).lacking == len(plan.buckets) > 0
    runtime, options = scorer.runtime, scorer.runtime.planner.sizing.options
    chunk = runtime.planner.sizing.tuning.readout_chunk
    facts = compile_facts(runtime.config, options.dtype, runtime.device, options.attention, chunk)
    entry = CompileCache(tmp_path / "cache").open(facts | {"weights": "in memory"})
    entry.publish(plan.buckets, plan.geometry, ProbeResult("sdpa"))
    choice = choose_engine(scorer.runtime, plan)
    assert (choice.lacking, choice.compile_s) == (0, engine_choice.LOAD)


OTHERS = {
    "compiled": {"engine": "compiled"},
    "require warm": {"require_warm": True},
    "streamed": {"stream_weights": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_means_the_compiled_engine_makes_no_estimate(name, tiny_llama, rows, tmp_path):
    options = {"device": "cpu", "engine": "auto", "cache_dir": tmp_path / "cache"} | OTHERS[name]
    scorer = Scorer.from_pretrained(tiny_llama, **options)
    plan = planned(scorer, read_questions(rows))
    assert choose_engine(scorer.runtime, plan) is None
    assert scorer.runtime.mode.engine == "compiled"


def test_shapes_for_later_questions_are_compiled(tiny_llama, rows, tmp_path):
    scorer, questions = scorer_of(tiny_llama, tmp_path), read_questions(rows)
    with scorer.runtime.planner.same_shapes():
        assert choose_engine(scorer.runtime, planned(scorer, questions)) is None
    scorer.runtime.planner.plan_ahead(100, 0)
    assert choose_engine(scorer.runtime, planned(scorer, questions)) is None


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_resumed_run_goes_on_with_its_engine(engine, tiny_llama, rows, tmp_path, monkeypatch):
    """The other engine is estimated to be faster by then."""
    monkeypatch.setattr(engine_choice, "SAVED", 0 if engine == "compiled" else 1e9)
    with Journal(tmp_path / "out") as journal:
        journal.begin({"engine": engine})
        journal.add(PASSES, 0, b"a pass")
    scorer = scorer_of(tiny_llama, tmp_path)
    plan = planned(scorer, read_questions(rows))
    with Journal(tmp_path / "out", resume=True) as journal:
        assert choose_engine(scorer.runtime, plan, journal).engine == engine
    assert choose_engine(scorer.runtime, plan).engine != engine


def test_the_choice_is_made_once_for_a_model(tiny_llama, rows, tmp_path, monkeypatch):
    scorer, questions = scorer_of(tiny_llama, tmp_path), read_questions(rows)
    first = scorer.score(questions, RunContext())
    monkeypatch.setattr(engine_choice, "SAVED", 1e9)
    again = scorer.score(questions, RunContext())
    assert scorer.runtime.mode.engine == scorer.choice.engine == "eager"
    assert again.loglikelihoods == first.loglikelihoods
