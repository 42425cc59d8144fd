"""The command line: argument handling only. Heavy imports wait inside the commands."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cecompile import demo
from cecompile.errors import CheckError, UserError
from cecompile.report.clock import CLOCKS, Clock, process_start
from cecompile.tasks.formats import TASKS


class OneLineErrors(click.Group):
    """Turns the package's own errors into one line on standard error and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, CheckError) as error:
            click.echo(f"cecompile: {error}", err=True)
            ctx.exit(2 if isinstance(error, UserError) else 1)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cecompile")
def cli() -> None:
    """Scores multiple-choice LLM benchmarks as packed token trees in static passes."""


def _limit(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise click.BadParameter("a count of questions, or a fraction between 0 and 1")
    return value


def selection(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what is scored and how."""
    options = [
        click.option("--model", metavar="DIR|HUB_ID", help="The checkpoint. Default: the embedded demo model."),
        click.option("--data", metavar="FILE|HUB_ID[:SPLIT]", help="The questions. Default: the embedded demo's."),
        click.option(
            "--task", type=click.Choice(("auto", *TASKS)), default="auto", help="Row format; auto tells by the fields."
        ),
        click.option("--limit", type=float, callback=_limit, help="First N questions, or a fraction below 1."),
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
        click.option(
            "--dtype", type=click.Choice(("auto", "float32", "bfloat16", "float16")), default="auto",
            help="auto is the checkpoint's.",
        ),
        click.option("--engine", type=click.Choice(("compiled", "eager", "reference")), default="compiled"),
        click.option("--attention", type=click.Choice(("auto", "flex", "sdpa")), default="auto"),
        click.option("--tokens-per-bucket", metavar="auto|N", default="auto", callback=_tokens, help="Slots a pass."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _tokens(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or not 128 <= int(value) <= 1 << 20:
        raise click.BadParameter("auto, or a number from 128 to 1048576")
    return int(value)


@cli.command("eval")
@selection
@click.option("--clock", "headline", type=click.Choice(CLOCKS), default="strict", help="Which latency is the headline.")
@click.option("--output", type=click.Path(path_type=Path), help="Result directory. Default: results/DATA-TIME.")
@click.option("--overwrite", is_flag=True, help="Replace the results in --output.")
def eval_command(
    data: str | None, task: str, limit: float | None, headline: str, output: Path | None, overwrite: bool, **how: Any
) -> None:
    """Score a dataset and write results.json and samples.jsonl."""
    from cecompile.report.results import prepare_output
    from cecompile.tasks.read import read_dataset

    clock = Clock(process_start())
    name = data or str(demo.HELLASWAG)
    output = output or Path("results") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    prepare_output(output, overwrite)
    clock.enter("preprocess")
    dataset = read_dataset(name, task, limit)
    clock.enter("load_model")
    from rich.console import Console

    from cecompile.evaluation import evaluate
    from cecompile.report.table import print_results, progress_bars

    scorer = _scorer(how)
    with progress_bars(Console(stderr=True)) as progress:
        evaluation = evaluate(
            scorer,
            dataset.questions,
            task=dataset.task,
            data=name,
            headline=headline,
            clock=clock,
            progress=progress,
            output=output,
        )
    print_results(Console(), evaluation.results, output)


@cli.command("plan")
@selection
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def plan_command(data: str | None, task: str, limit: float | None, as_json: bool, **how: Any) -> None:
    """Show buckets, fill and the tokens that sharing saves. Loads no weights."""
    from cecompile.tasks.read import read_questions

    questions = read_questions(data or str(demo.HELLASWAG), task, limit)
    from rich.console import Console

    from cecompile.report.results import plan_summary
    from cecompile.report.table import print_plan

    if how["engine"] == "reference":
        raise UserError("--engine reference: runs without a plan")
    workload = _scorer(how).prepare(questions)
    assert workload.plan is not None
    summary = plan_summary(workload.plan)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        print_plan(Console(), summary)


def _scorer(how: dict[str, Any]) -> Any:
    from cecompile.scorer import Scorer

    return Scorer.from_pretrained(
        how["model"],
        device=how["device"],
        dtype=how["dtype"],
        engine=how["engine"],
        attention=how["attention"],
        tokens_per_bucket=how["tokens_per_bucket"],
    )


def main() -> None:
    """Entry point of the console script."""
    try:
        cli(prog_name="cecompile")
    except BrokenPipeError:
        sys.exit(1)
