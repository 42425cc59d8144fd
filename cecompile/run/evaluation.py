"""An evaluation: scores or answers, judged, and all contents of results.json."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cecompile.model.structure import on_meta
from cecompile.model.tokenizer_digest import tokenizer_digest
from cecompile.results.clock import Clock, latencies, spread
from cecompile.results.compare import Baseline, compare, refuse_other
from cecompile.results.journal import Journal
from cecompile.results.spool import Spool
from cecompile.results.write import (
    SCHEMA,
    digest_of_results,
    file_digests,
    plan_summary,
    refuse_results,
    write_predictions,
    write_results,
    write_samples,
)
from cecompile.run import provenance
from cecompile.run.answerer import Answerer
from cecompile.run.context import Progress, RunContext
from cecompile.run.scorer import Scorer
from cecompile.run.windows import Judge, Judged, run_in_windows
from cecompile.tasks.chat import AnswerSample, ChatQuestion, answer_metrics, judge_answer
from cecompile.tasks.judge import Sample, metrics
from cecompile.tasks.judge import judge as judge_choices
from cecompile.tasks.question import Question, digest
from cecompile.tasks.windows import Windows


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The contents of results.json and samples.jsonl; the samples of a run in windows are read from disk."""

    results: dict[str, Any]
    samples: list[Sample] | list[AnswerSample] | Spool


def evaluate(
    model: Scorer | Answerer, questions: Sequence[Question] | Sequence[ChatQuestion] | Windows, *,
    window: int | None = None, task: str = "choices", data: str = "questions", headline: str = "strict",
    clock: Clock | None = None, progress: Progress = lambda *_: None, repeat: int = 1, output: Path | None = None,
    journal: Journal | None = None, report: Callable[[dict[str, Any]], None] = lambda _: None,
    baseline: Baseline | None = None, command: Sequence[str] | None = None,
) -> Evaluation:  # fmt: skip
    """Scores or answers the questions, and judges.

    Args:
        model: a scorer, or an answerer for chat questions.
        questions: at least one.
        window: most questions held at a time; prefixes are shared within a window. None holds all.
        task, data: names for the result.
        headline: the latency that the run is known by: "strict", "section3" or "inference".
        clock: already running where reading is to be counted; left in the phase `score`.
        progress, repeat: see `RunContext`. Of several repeats, latencies count the median.
        output: directory for the result files; None writes nothing. Of several ranks, rank 0 writes.
        journal: of `output`, open. Finished work is taken from it; the journal is removed when all is written.
        report: called with the results before they are written, as the last thing that the clock sees.
        baseline: a result to compare with; the results then have a `comparison`.
        command: the command line of this run, for the record.

    Raises:
        UserError: see `Scorer.score`; the baseline is of other questions or another model; or the file system refuses.
        CheckError: see `Scorer.score`; or the model on the device is not what was loaded.
    """
    run = RunContext(clock or Clock(), progress, journal, repeat)
    if window is not None and not isinstance(questions, Windows) and len(questions) > window:
        questions = Windows.of(questions, window)
    digested = questions.digest if isinstance(questions, Windows) else digest(questions)
    known = {"task": task, "questions": len(questions), "data": {"name": data, "digest": digested}}
    _begin(model, known, baseline, journal)
    judge: Judge = _answered if isinstance(model, Answerer) else _scored
    if isinstance(questions, Windows):
        judged = run_in_windows(judge, model, questions, run, output)
    else:
        judged = judge(model, questions, run)
    resumed = None if journal is None else journal.resumed
    times = functools.partial(_times, run.clock, judged.inference_s, headline, resumed)
    results = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": None if command is None else list(command),
        **known,
        **judged.facts,
        "resumed": resumed,
        "warmed": run.clock.since_start(judged.warm_moments),
        "inference_s": spread(judged.inference_s),
        "plan": None if judged.plan is None else plan_summary(judged.plan),
        **provenance.describe(model),
        **times(),
    }
    if journal is not None and output is not None:
        model.runtime.ranks.first_does(lambda: None if journal.replaces else refuse_results(output))
    _write(model, judged, results, output, baseline, report, times)
    if journal is not None:
        journal.remove()
    return Evaluation(results, judged.samples)


def _begin(model: Scorer | Answerer, known: dict[str, Any], baseline: Baseline | None, journal: Journal | None) -> None:
    """Checks before anything is loaded that baseline, ranks and journal belong to the same model, task and data."""
    runtime = model.runtime
    if baseline is not None:
        kind = provenance.kind(on_meta(runtime.config))
        asked = known | {"model": {"tokenizer_digest": tokenizer_digest(model.tokenizer), **kind}}
        if isinstance(model, Answerer):
            asked["answers"] = {"max_new_tokens": model.new_tokens}
        refuse_other(baseline.stored, runtime.name, asked, whole=False)
        runtime.weights.expected_fingerprint = baseline.stored.results["model"]["fingerprint"]
    facts = {"task": known["task"], "data digest": known["data"]["digest"], **provenance.version_facts(runtime)}
    runtime.ranks.all_same(facts)
    if journal is not None:
        journal.expect(facts)
    runtime.weights.watch()
    runtime.ranks.clear_tally()


def _times(clock: Clock, inference: Sequence[float], headline: str, resumed: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the results' clock entries up to now. A resumed run has no headline."""
    phases = clock.phases()
    seconds = latencies(phases, inference)
    return {
        "latency_s": seconds,
        "headline": {"clock": headline, "seconds": None if resumed else seconds[headline]},
        "phases_s": phases,
        "timeline": clock.timeline(),
    }


def _write(
    model: Scorer | Answerer, judged: Judged, results: dict[str, Any], output: Path | None, baseline: Baseline | None,
    report: Callable[[dict[str, Any]], None], times: Callable[[], dict[str, Any]],
) -> None:  # fmt: skip
    """Adds comparison, digests and final times to the results, and writes all result files."""
    ranks = model.runtime.ranks
    if baseline is not None:
        name = "this run" if output is None else str(output)
        comparison, _ = compare(baseline.stored, name, results, list(judged.samples), baseline.max_drop)
        results["comparison"] = asdict(comparison)
    directory = output if ranks.rank == 0 else None
    if directory is not None:
        write_samples(directory, judged.samples)
        if isinstance(model, Answerer):
            write_predictions(directory, (sample.text for sample in judged.samples))
    results["samples_digest"] = None if directory is None else file_digests(directory)
    report(results)
    results.update(times())
    results["digest"] = digest_of_results(results)
    if directory is not None:
        write_results(directory, results)
    ranks.barrier()


def _scored(scorer: Scorer, questions: Sequence[Question], run: RunContext) -> Judged:
    scores = scorer.score(questions, run)
    run.clock.enter("score")
    samples = [
        judge_choices(question, values, greedy)
        for question, values, greedy in zip(questions, scores.loglikelihoods, scores.greedy, strict=True)
    ]
    facts = {
        "choices": sum(len(q.choices) for q in questions),
        "truncated_questions": scores.workload.truncated_questions,
        "metrics": metrics(samples),
    }
    return Judged(samples, facts, scores.workload.plan, scores.inference_s, scorer.runtime.warmup.moments)


def _answered(answerer: Answerer, questions: Sequence[ChatQuestion], run: RunContext) -> Judged:
    answers = answerer.answer(questions, run)
    run.clock.enter("score")
    samples = [
        judge_answer(question, one.text, one.tokens, one.decoded_tokens)
        for question, one in zip(questions, answers.answers, strict=True)
    ]
    known = [s for s in samples if s.tokens is not None]
    facts = {
        "choices": sum(len(q.choices) for q in questions),
        "metrics": answer_metrics(samples),
        "answers": {
            "in_tree": sum(bool(s.in_tree) for s in known) if known else None,
            "tokens": sum(s.tokens or 0 for s in known) if known else None,
            "decoded_tokens": sum(s.decoded_tokens or 0 for s in known) if known else None,
            "max_new_tokens": answerer.new_tokens,
        },
    }
    return Judged(samples, facts, answers.workload.plan, answers.inference_s, answerer.runtime.warmup.moments)
