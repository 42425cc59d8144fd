"""An evaluation: scores or answers, judged, with everything that results.json says about the run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cecompile.model.structure import on_meta
from cecompile.model.tokenizer_digest import tokenizer_digest
from cecompile.results.clock import Clock, spread
from cecompile.results.compare import Baseline, compare, refuse_other
from cecompile.results.journal import Journal
from cecompile.results.spool import Spool
from cecompile.results.write import (
    SCHEMA,
    digest_of_results,
    environment,
    file_digests,
    plan_summary,
    write_predictions,
    write_results,
    write_samples,
)
from cecompile.run import provenance
from cecompile.run.answerer import Answerer
from cecompile.run.progress import Progress
from cecompile.run.scorer import Scorer
from cecompile.run.windows import Judged, run_in_windows
from cecompile.tasks.chat import AnswerSample, ChatQuestion, answer_metrics, judge_answer
from cecompile.tasks.judge import Sample, judge, metrics
from cecompile.tasks.question import Question, digest
from cecompile.tasks.windows import Windows


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What results.json and samples.jsonl hold; the samples of a run in windows are read from disk."""

    results: dict[str, Any]
    samples: list[Sample] | list[AnswerSample] | Spool


def evaluate(
    model: Scorer | Answerer,
    questions: Sequence[Question] | Sequence[ChatQuestion] | Windows,
    *,
    window: int | None = None,
    task: str = "choices",
    data: str = "questions",
    headline: str = "strict",
    clock: Clock | None = None,
    progress: Progress = lambda *_: None,
    repeat: int = 1,
    output: Path | None = None,
    journal: Journal | None = None,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
    baseline: Baseline | None = None,
    command: Sequence[str] | None = None,
) -> Evaluation:
    """Scores or answers, and judges.

    Args:
        model: a scorer, or an answerer for chat questions.
        questions: at least one.
        window: where there are more, do all up to judging with so many at a time; None does it with all at once.
            Prefixes are shared within a window.
        task, data: names for the result.
        headline: which latency the run is known by: "strict", "section3" or "inference".
        clock: already running where reading is to be counted; left in the phase `score`.
        progress: see `Scorer.score`.
        repeat: times the inference phase runs; the latencies then count its median.
        output: directory for results.json and samples.jsonl, and answers' predictions.jsonl; None writes nothing. Of
            several ranks, rank 0 writes.
        journal: of `output`, open; takes what is finished as it is, and is removed when all is written.
        report: called with the results before they are written, as the last thing that the clock sees.
        baseline: a result to compare with; the results then have a `comparison`.
        command: the command line that this is, for the record.

    Raises:
        UserError: see `Scorer.score`; or the baseline is of other questions or another model, told as soon as it shows;
            or the file system refuses. The journal then keeps what is finished.
        CheckError: see `Scorer.score`; or the model on the device is not what was loaded.
    """
    clock = clock or Clock()
    if window is not None and not isinstance(questions, Windows) and len(questions) > window:
        questions = Windows.of(questions, window)
    data_digest = questions.digest if isinstance(questions, Windows) else digest(questions)
    runtime, data_facts = model.runtime, {"name": data, "digest": data_digest}
    if baseline is not None:
        _expect(baseline, model, {"task": task, "questions": len(questions), "data": data_facts})
    known = {"task": task, "data digest": data_digest, **provenance.version_facts(runtime)}
    runtime.ranks.all_same(known)
    if journal is not None:
        journal.expect(known)
    runtime.watch()
    runtime.ranks.clear_tally()
    run = _answered if isinstance(model, Answerer) else _scored
    if isinstance(questions, Windows):
        judged = run_in_windows(run, model, questions, clock, progress, repeat, journal, output)
    else:
        judged = run(model, questions, clock, progress, repeat, journal)  # type: ignore[arg-type]
    resumed = None if journal is None else journal.resumed
    plan, model_facts = judged.plan, provenance.model(model)
    shares = runtime.ranks.gather(provenance.share(runtime))
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": None if command is None else list(command),
        "task": task,
        "questions": len(questions),
        **judged.facts,
        **provenance.times(clock, judged.inference_s, headline, resumed),
        "resumed": resumed,
        "warmed": clock.since_start(judged.warm_moments),
        "inference_s": spread(judged.inference_s),
        "engine": {
            "name": runtime.engine,
            "attention": None if runtime.engine == "reference" else runtime.attention,
            "note": runtime.note,
        },
        "ranks": None if runtime.ranks.size == 1 else {"size": len(shares)} | provenance.columns(shares, "peak"),
        "pipeline": provenance.pipeline(runtime),
        "plan": None if plan is None else plan_summary(plan),
        "streaming": runtime.streaming,
        "model": model_facts,
        "cache": None
        if runtime.cache_state is None
        else {"state": runtime.cache_state[0], "reason": runtime.cache_state[1]},
        "memory": {
            "limit_bytes": runtime.sizing.limit,
            "predicted_bytes": runtime.predicted_bytes,
            "peak_bytes": max(share["peak"] for share in shares),
        },
        "data": data_facts,
        "environment": environment(provenance.device_name(runtime.device)),
    }
    if baseline is not None:
        name = "this run" if output is None else str(output)
        comparison, _ = compare(baseline.stored, name, results, list(judged.samples), baseline.max_drop)
        results["comparison"] = asdict(comparison)
    if runtime.ranks.rank:
        output = None  # rank 0 writes
    if output is not None:
        write_samples(output, judged.samples)
        if isinstance(model, Answerer):
            write_predictions(output, (sample.text for sample in judged.samples))
    results["samples_digest"] = None if output is None else file_digests(output)
    report(results)
    results.update(provenance.times(clock, judged.inference_s, headline, resumed))
    results["digest"] = digest_of_results(results)
    if output is not None:
        write_results(output, results)
    runtime.ranks.barrier()
    if journal is not None:
        journal.remove()
    return Evaluation(results, judged.samples)


def _scored(
    scorer: Scorer, questions: Sequence[Question], clock: Clock, progress: Progress, repeat: int,
    journal: Journal | None,
) -> Judged:  # fmt: skip
    scores = scorer.score(questions, clock=clock, progress=progress, repeat=repeat, journal=journal)
    clock.enter("score")
    samples = [
        judge(question, values, greedy)
        for question, values, greedy in zip(questions, scores.loglikelihoods, scores.greedy, strict=True)
    ]
    facts = {
        "choices": sum(len(q.choices) for q in questions),
        "truncated_questions": scores.workload.truncated_questions,
        "metrics": metrics(samples),
    }
    return Judged(samples, facts, scores.workload.plan, scores.inference_s, scorer.runtime.warm_moments)


def _answered(
    answerer: Answerer, questions: Sequence[ChatQuestion], clock: Clock, progress: Progress, repeat: int,
    journal: Journal | None,
) -> Judged:  # fmt: skip
    answers = answerer.answer(questions, clock=clock, progress=progress, repeat=repeat, journal=journal)
    clock.enter("score")
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
    return Judged(samples, facts, answers.workload.plan, answers.inference_s, answerer.runtime.warm_moments)


def _expect(baseline: Baseline, model: Scorer | Answerer, known: dict[str, Any]) -> None:
    """Refuses a baseline of something else, as far as it shows before anything is loaded; the weights do later."""
    runtime, stored = model.runtime, baseline.stored
    known["model"] = {"tokenizer_digest": tokenizer_digest(model.tokenizer), **provenance.kind(on_meta(runtime.config))}
    if isinstance(model, Answerer):
        known["answers"] = {"max_new_tokens": model.new_tokens}
    refuse_other(stored, runtime.name, known, whole=False)
    runtime.expected_fingerprint = stored.results["model"]["fingerprint"]
