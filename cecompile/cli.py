"""The command line: argument handling only. Heavy imports wait inside the commands."""

import contextlib
import json
import locale
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from cecompile import streams
from cecompile.cli_options import MOST, Percentage, begin_reading, model_of, named, pipeline_option, selection
from cecompile.contest import contest_command
from cecompile.errors import AlreadyReportedError, CheckError, RecurringError, UserError, first_line
from cecompile.imports import import_transformers
from cecompile.interrupt import Interrupted, command_to_resume, end_children, signals_raise
from cecompile.planning.profiles import PROFILES
from cecompile.ranks import ALONE, Ranks, has_part_in
from cecompile.report.document.words import LANGUAGES
from cecompile.results.clock import CLOCKS, Clock, process_start
from cecompile.tasks.judge import MAX_DROP

MAX_DROP_RANGE, MAX_DROP_HELP = Percentage(), "Points that a metric may drop by."


class OneLineErrors(click.Group):
    """Turns the package's own errors and signals into one line on standard error and an exit status."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with signals_raise():
                return super().invoke(ctx)
        except (UserError, CheckError) as error:
            line = f"{error}{'' if isinstance(error, RecurringError) else _resuming(ctx, begun=True)}"
            if not isinstance(error, AlreadyReportedError) and ctx.meta.get("ranks", ALONE).says(line):
                click.echo(f"cecompile: {_speaker(ctx)}{line}", err=True)
            ctx.exit(2 if isinstance(error, UserError) else 1)
        except ImportError as error:
            click.echo(f"cecompile: {_speaker(ctx)}{first_line(error)}; installed: {_versions()}", err=True)
            ctx.exit(2)
        except (Warning, UnicodeError) as error:
            encoding = locale.getpreferredencoding(False)
            if isinstance(error, Warning):
                fault = "Python turns warnings into errors; leave out -W error and PYTHONWARNINGS"
            elif encoding.lower().replace("-", "") != "utf8":
                fault = f"Python takes files for {encoding}; set PYTHONUTF8=1"
            else:
                raise
            click.echo(f"cecompile: {_speaker(ctx)}{fault}: {first_line(error)}", err=True)
            ctx.exit(2)
        except Interrupted as error:
            nothing = "; nothing to resume" if ctx.invoked_subcommand == "eval" else ""
            click.echo(f"cecompile: {_speaker(ctx)}{error}{_resuming(ctx) or nothing}", err=True)
            ctx.exit(error.status)


def _versions() -> str:
    """The installed versions of the libraries whose names change between versions."""
    from importlib import metadata

    installed = []
    for name in ("torch", "transformers", "datasets", "lm_eval"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed.append(f"{name} {metadata.version(name)}")
    return ", ".join(installed)


def _speaker(ctx: click.Context) -> str:
    """The prefix of a line that names the rank; empty for rank 0."""
    rank = ctx.meta.get("ranks", ALONE).rank
    return f"rank {rank}: " if rank else ""


def _resuming(ctx: click.Context, begun: bool = False) -> str:
    """The end of a line that says how to resume. With `begun`, only if this command has begun the journal itself."""
    journal = ctx.meta.get("journal")
    if journal is None or not journal.resumable or (begun and not journal.begun):
        return ""
    stages = ctx.meta.get("ranks", ALONE).stages
    return f"; continue with: {command_to_resume(ctx.meta['arguments'], journal.directory, stages)}"


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cecompile")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Scores multiple-choice LLM benchmarks as packed token trees in static passes."""
    if not has_part_in(str(ctx.invoked_subcommand)):
        ctx.exit(0)


@cli.command("eval")
@selection
@pipeline_option
@click.option("--require-warm", is_flag=True, help="Fail (exit 1) if something would have to be compiled.")
@click.option("--repeat", type=click.IntRange(1, MOST), default=1, help="Run the inference phase this many times.")
@click.option("--clock", "headline", type=click.Choice(CLOCKS), default="strict", help="Which latency is the headline.")
@click.option("--output", type=click.Path(path_type=Path), help="Result directory. Default: results/DATA-TIME.")
@click.option("--overwrite", is_flag=True, help="Replace the results in --output.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run in --output.")
@click.option("--baseline", type=click.Path(path_type=Path), help="A result directory to compare with at the end.")
@click.option("--max-drop", type=MAX_DROP_RANGE, default=MAX_DROP, show_default=True, help=MAX_DROP_HELP)
@click.pass_context
def eval_command(
    ctx: click.Context, data: str | None, task: str, limit: float | None, window: int, headline: str,
    output: Path | None, overwrite: bool, resume: bool, repeat: int, baseline: Path | None, max_drop: float, **how: Any,
) -> None:  # fmt: skip
    """Score or answer a dataset; write results.json, samples.jsonl and, for answers, predictions.jsonl.

    Under torchrun, on one machine or several, its processes share the work: torchrun --nproc-per-node 4 -m cecompile
    eval ...
    """
    if resume and (overwrite or output is None):
        raise UserError("--resume: goes on with the run in --output, which must be named, and not with --overwrite")
    begin_reading(how["model"])
    from cecompile.results.compare import read_baseline
    from cecompile.results.journal import Journal, journals_in
    from cecompile.results.write import prepare_output
    from cecompile.tasks.read import read_windows

    clock = Clock(process_start())
    name = named(data, task)
    ctx.meta["ranks"] = ranks = Ranks.from_environment(how["pipeline"])
    began = time.strftime("%Y%m%d-%H%M%S", time.localtime(ranks.began))
    output = to = ranks.broadcast(output or Path("results") / f"{Path(name).stem}-{began}")
    if ranks.attempt:  # started again by torchrun, with the same arguments
        resume = ranks.any(bool(journals_in(to)))
    replace = overwrite or ranks.attempt > 0
    ranks.first_does(lambda: prepare_output(to, replace or resume, resume, name))
    ctx.meta["journal"] = journal = ctx.with_resource(Journal(output, resume, ranks, replace=replace))
    ranks.first_does(lambda: prepare_output(to, journal.replaces, resume))  # another run may have ended in between
    compared = None if baseline is None or ranks.rank else read_baseline(baseline, max_drop)
    clock.enter("preprocess")
    dataset = read_windows(name, task, limit, window)
    if dataset.note and ranks.rank == 0:
        click.echo(f"cecompile: {name}: {dataset.note}", err=True)
    clock.enter("load_model")
    import_transformers("cecompile.run.evaluation")
    from rich.console import Console

    from cecompile.compile_cache.store import remove_workspaces
    from cecompile.report.table import print_results, progress_bars
    from cecompile.run.evaluation import evaluate

    console = Console()

    def report(results: dict[str, Any]) -> None:
        """Makes the table while the clock runs; it is printed once the results are written."""
        if ranks.rank == 0:
            with console.capture() as capture:
                print_results(console, results, to)
            table.append(capture.get())
        remove_workspaces()

    table: list[str] = []
    model = model_of(how, dataset.task, ranks)
    with progress_bars(Console(stderr=True, force_terminal=False if ranks.rank else None)) as progress:
        evaluation = evaluate(
            model, dataset.questions, task=dataset.task, data=name, headline=headline, clock=clock, progress=progress,
            repeat=repeat, output=output, journal=journal, report=report, baseline=compared,
            command=["cecompile", *ctx.meta["arguments"]],
        )  # fmt: skip
    sys.stdout.write("".join(table))
    if evaluation.results.get("comparison", {}).get("verdict") == "past":
        raise CheckError(f"past --max-drop against {baseline}; results in {output}")


@cli.command("compare")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--max-drop", type=MAX_DROP_RANGE, default=MAX_DROP, show_default=True, help=MAX_DROP_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as one JSON object.")
def compare_command(reference: Path, candidate: Path, max_drop: float, as_json: bool) -> None:
    """Compare two results of the same questions and model, and check each result for contradictions.

    REFERENCE and CANDIDATE are result directories. The exit status is 1 if a metric drops by more than --max-drop
    points or a result contradicts itself, 2 if they are not comparable.
    """
    from rich.console import Console

    from cecompile.report.table import print_comparison
    from cecompile.results.compare import compare_directories

    compared = compare_directories(reference, candidate, max_drop)
    if as_json:
        click.echo(json.dumps(compared))
    else:
        print_comparison(Console(), compared)
    if compared["failed"]:
        others = len(compared["failed"]) - 1
        raise CheckError(compared["failed"][0] + (f" (and {others} more)" if others else ""))


@cli.command("plan")
@selection
@pipeline_option
@click.option("--profile", type=click.Choice(tuple(PROFILES)), help="Estimate the time of each phase on this device.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def plan_command(
    data: str | None, task: str, limit: float | None, window: int, profile: str | None, as_json: bool, **how: Any
) -> None:
    """Show buckets, fill and the tokens that sharing saves. Loads no weights.

    With --profile the plan is the one for that device, whatever --device is.
    """
    from cecompile.tasks.read import read_windows

    dataset = read_windows(named(data, task), task, limit, window)
    import_transformers("cecompile.run.windows")
    from rich.console import Console

    from cecompile.planning.estimate import as_planned_on, estimate, weights_fit
    from cecompile.report.table import print_plan
    from cecompile.results.write import plan_summary
    from cecompile.run.windows import plan_in_windows

    if how["engine"] == "reference":
        raise UserError("--engine reference: runs without a plan; choose another engine")
    if profile and how["pipeline"] > 1:
        raise UserError("--profile: estimates are for one device; leave out --pipeline")
    model = model_of(as_planned_on(profile, how) if profile else how, dataset.task)
    runtime, fit = model.runtime, how["memory_limit"] is not None
    if profile and not fit:  # where the weights do not, the plan is shown all the same, and says so
        fit = how["stream_weights"] or weights_fit(profile, runtime.planner.sizing.needs.model_sizes().parameters)
    plan, sequences = plan_in_windows(model, dataset.questions, fit)
    streaming = runtime.planner.planned_streaming(plan)
    summary = plan_summary(plan) | {"memory": runtime.planner.budget(plan).summary()}
    summary |= {"stages": runtime.planner.stages(plan)} | ({"streaming": streaming} if streaming else {})
    estimated = estimate(profile, runtime.config, plan, sequences, streaming) if profile else None
    if as_json:
        click.echo(json.dumps(summary | ({"estimate": estimated} if estimated else {})))
    else:
        print_plan(Console(), summary, estimated)


@cli.command("warm")
@selection
@click.option(
    "--max-depth", type=click.IntRange(1, MOST),
    help="Longest sequence, in tokens, of data not yet seen; with --task chat the longest prompt.",
)  # fmt: skip
@click.option("--tune", is_flag=True, help="Measure bucket sizes on the data and record the fastest.")
@click.option("--list", "list_", is_flag=True, help="Show what the cache holds.")
@click.option("--prune", is_flag=True, help="Remove what can no longer be used.")
def warm_command(
    data: str | None, task: str, limit: float | None, window: int, max_depth: int | None, tune: bool, list_: bool,
    prune: bool, **how: Any,
) -> None:  # fmt: skip
    """Compile and capture every bucket, and keep the result for later runs."""
    from rich.console import Console

    from cecompile.report.table import print_cache, print_warmup, progress_bars

    if list_ or prune:
        from cecompile.compile_cache.key import is_outdated
        from cecompile.compile_cache.store import CompileCache, default_directory

        cache = CompileCache(how["cache_dir"] or default_directory())
        if prune:
            freed = cache.remove(e.key for e in cache.entries() if e.problem or is_outdated(e.facts))
            click.echo(f"freed {freed / 1e6:.1f} MB")
        if list_:
            print_cache(Console(), cache.directory, cache.entries())
        return
    if max_depth is not None and (data is not None or tune):
        raise UserError("--max-depth: is for data not yet seen; leave out --data and --tune")
    begin_reading(how["model"])
    from cecompile.tasks.read import read_windows

    dataset = None if max_depth is not None else read_windows(named(data, task), task, limit, window)
    import_transformers("cecompile.run.warm_cache")
    from cecompile.run.warm_cache import warm

    model = model_of(how, task if dataset is None else dataset.task)
    questions = None if dataset is None else dataset.questions
    with progress_bars(Console(stderr=True)) as progress:
        built = warm(model, questions, max_depth=max_depth or 1, tune=tune, progress=progress)
    print_warmup(Console(), built, model.runtime.mode.note)


@cli.command("doctor")
@selection
@click.option("--json", "as_json", is_flag=True, help="Print the facts and findings as one JSON object.")
@click.pass_context
def doctor_command(
    ctx: click.Context, data: str | None, task: str, limit: float | None, window: int, as_json: bool, **how: Any
) -> None:
    """Show the machine, the versions, and what will go wrong or be slow here.

    With --model or --data also try what such a run does: allocate its memory, compile, capture, read the checkpoint.
    Ends with go, or with no-go and exit status 1.
    """
    from rich.console import Console

    from cecompile.doctor.findings import as_json_object, judge, print_doctor
    from cecompile.doctor.machine import gather
    from cecompile.doctor.preflight import preflight_json, print_preflight

    facts = gather()
    findings, tried = judge(facts), None
    if how["model"] is not None or data is not None:
        tried = _preflight(facts, (named(data, task), task, limit, window), how)
        findings = [one for one in findings if one.problem not in {other.problem for other in tried.no_go}]
    if as_json:
        more = {} if tried is None else {"preflight": preflight_json(tried)}
        click.echo(json.dumps(as_json_object(facts, findings) | more))
    else:
        print_doctor(Console(), facts, findings)
        if tried is not None:
            print_preflight(Console(), tried)
    ctx.exit(1 if tried is not None and tried.no_go else 0)


@cli.command("report")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--png", type=click.Path(path_type=Path), help="The card. Default: card.png in the result directory.")
@click.option("--pdf", type=click.Path(path_type=Path), help="The document. Default: report.pdf beside it.")
@click.option("--lang", type=click.Choice(LANGUAGES), default="en", show_default=True, help="Language of both.")
@click.option("--overwrite", is_flag=True, help="Replace the files if they are there.")
def report_command(directory: Path, png: Path | None, pdf: Path | None, lang: str, overwrite: bool) -> None:
    """Make a leaderboard card and a document on the method from the result in DIRECTORY."""
    try:
        from cecompile.report.document.make import make_report
    except ImportError as error:
        raise UserError(f"report: {error}; pip install 'cecompile[report]'") from None

    for path in make_report(directory, png=png, pdf=pdf, languages=[lang], overwrite=overwrite):
        click.echo(path)


cli.add_command(contest_command)


@cli.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval_command(arguments: tuple[str, ...]) -> None:
    """lm-evaluation-harness's command line, with `--model cecompile` known to it.

    For example: cecompile lm-eval -- --model cecompile --model_args pretrained=DIR --tasks hellaswag
    """
    try:
        from cecompile.lm_eval import run_command_line
    except ImportError as error:
        raise UserError(f"lm-eval: {error}; pip install 'cecompile[lm-eval]'") from None

    run_command_line(arguments)


def _preflight(facts: Any, rows: tuple[Any, ...], how: dict[str, Any]) -> Any:
    """Tries the machine for a run of the `rows` that `read_windows` is given."""
    if how["engine"] == "reference":
        raise UserError("--engine reference: runs without a plan; choose another engine")
    import_transformers("cecompile.run.preflight")
    from cecompile.run.preflight import preflight
    from cecompile.run.windows import plan_in_windows
    from cecompile.tasks.read import read_windows

    def planned() -> Any:
        dataset = read_windows(*rows)
        model = model_of(how, dataset.task)
        return model.runtime, *plan_in_windows(model, dataset.questions, fit=True)

    return preflight(planned, facts)


def main() -> None:
    """Entry point of the console script.

    Ends the process once all is written. Taking an interpreter with torch apart takes about a second, which no phase of
    the clock would count; a thread of gloo would abort there.
    """
    status: Any = 1
    try:
        cli(prog_name="cecompile")
    except SystemExit as error:
        status = error.code or 0
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    if "cecompile.compile_cache.store" in sys.modules:
        sys.modules["cecompile.compile_cache.store"].remove_workspaces()
    if status > 128:
        end_children()
    streams.flush()
    lost = streams.failure()
    if lost is not None and status == 0:
        print(f"cecompile: standard output cannot be written: {lost.strerror}; all else was done", file=sys.stderr)
        streams.flush()
        status = 2
    os._exit(status)
