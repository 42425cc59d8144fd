"""The options that several commands share, and what they name: the questions to score, and the model that runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cecompile import demo
from cecompile.model import prefetch
from cecompile.ranks import ALONE, Ranks, world_size
from cecompile.tasks.chat import NEW_TOKENS
from cecompile.tasks.formats import TASKS
from cecompile.tasks.read import is_limit
from cecompile.tasks.windows import WINDOW

TOKENS = 128, 1 << 20  # slots of a pass
MOST = 1 << 30  # of whatever is counted; no run comes near it


class Percentage(click.FloatRange):
    """A number from 0 to 100."""

    name = "percentage"

    def __init__(self) -> None:
        super().__init__(0, 100)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:  # no comparison with NaN holds, so that no range excludes it
            self.fail("not a number", param, ctx)
        return number


def _limit(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if not is_limit(value):
        raise click.BadParameter("a count of questions, or a fraction between 0 and 1")
    return value


new_tokens_option = click.option(
    "--max-new-tokens", type=click.IntRange(1, MOST), default=NEW_TOKENS, show_default=True,
    help="Longest answer to a chat question.",
)  # fmt: skip


def selection(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that choose the questions, the model and how the model runs."""
    options: list[Callable[..., Any]] = [
        click.option("--model", metavar="DIR|HUB_ID", help="The checkpoint. Default: the embedded demo model."),
        click.option("--data", metavar="FILE|HUB_ID[:SPLIT]", help="The questions. Default: the embedded demo's."),
        click.option(
            "--task", type=click.Choice(("auto", *TASKS)), default="auto",
            help="Row format, or a group of formats; auto tells by the fields, which docs/running.md lists.",
        ),
        new_tokens_option,
        click.option(
            "--window", type=click.IntRange(1, MOST), default=WINDOW, show_default=True,
            help="Questions in memory at a time; where there are more, prefixes are shared within a window.",
        ),
        click.option("--limit", type=float, callback=_limit, help="First N questions, or a fraction below 1."),
        running,
        click.option(
            "--stream-weights", is_flag=True,
            help="Read the layers' weights anew for each sweep of passes: for models larger than memory.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def running(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of how a model that fits into memory runs."""
    options = [
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
        click.option(
            "--dtype", type=click.Choice(("auto", "float32", "bfloat16", "float16")), default="auto",
            help="auto is the checkpoint's.",
        ),
        click.option(
            "--engine", type=click.Choice(("auto", "compiled", "eager", "reference")), default="auto",
            help="auto compiles unless, on a CPU, compiling takes longer than it saves, by an estimate.",
        ),
        click.option("--attention", type=click.Choice(("auto", "flex", "sdpa")), default="auto"),
        click.option("--tokens-per-bucket", metavar="auto|N", default="auto", callback=_tokens, help="Slots a pass."),
        click.option(
            "--memory-limit", metavar="SIZE", callback=_size,
            help="What a run may take, such as 28GB or 26GiB. Default: what the device has.",
        ),
        click.option(
            "--cache-dir", type=click.Path(path_type=Path),
            help="Compiled code. Default: CECOMPILE_CACHE, else the user's cache directory.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _tokens(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    number = int(value) if value.isdecimal() and len(value) < 20 else 0
    if not TOKENS[0] <= number <= TOKENS[1]:
        raise click.BadParameter(f"auto, or a number from {TOKENS[0]} to {TOKENS[1]}")
    return number


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from cecompile.device import parse_size

    try:
        return parse_size(value)
    except ValueError:
        raise click.BadParameter("a number of bytes, with a unit such as MB, GB or GiB") from None


pipeline_option = click.option(
    "--pipeline", type=click.IntRange(1, MOST), default=1, show_default=True,
    help="Divide the layers among this many processes, which torchrun starts.",
)  # fmt: skip


def named(data: str | None, task: str) -> str:
    """The dataset to read: the embedded questions for the task where none is named."""
    return str(demo.CHAT if task == "chat" else demo.HELLASWAG) if data is None else data


def begin_reading(model: str | None) -> None:
    """Reads the weights while libraries are imported. Several ranks would each read all weights, and so do not."""
    if model is not None and world_size() == 1:
        prefetch.begin(model)


def model_of(how: dict[str, Any], task: str, ranks: Ranks = ALONE) -> Any:
    """A scorer, or an answerer for chat questions."""
    from cecompile.run.answerer import Answerer
    from cecompile.run.scorer import Scorer

    options = {name: value for name, value in how.items() if name not in ("model", "max_new_tokens")}
    if task == "chat":
        return Answerer.from_pretrained(how["model"], ranks=ranks, new_tokens=how["max_new_tokens"], **options)
    return Scorer.from_pretrained(how["model"], ranks=ranks, **options)
