"""The options that several commands share: which questions are scored, and how the model runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cecompile.tasks.chat import NEW_TOKENS
from cecompile.tasks.formats import TASKS
from cecompile.tasks.windows import WINDOW


def _limit(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (0 < value < 1 or (value >= 1 and value.is_integer())):
        raise click.BadParameter("a count of questions, or a fraction between 0 and 1")
    return value


new_tokens_option = click.option(
    "--max-new-tokens", type=click.IntRange(1), default=NEW_TOKENS, show_default=True,
    help="Longest answer to a chat question.",
)  # fmt: skip


def selection(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that choose the questions, the model and how the model runs."""
    options: list[Callable[..., Any]] = [
        click.option("--model", metavar="DIR|HUB_ID", help="The checkpoint. Default: the embedded demo model."),
        click.option("--data", metavar="FILE|HUB_ID[:SPLIT]", help="The questions. Default: the embedded demo's."),
        click.option(
            "--task", type=click.Choice(("auto", *TASKS)), default="auto", help="Row format; auto tells by the fields."
        ),
        new_tokens_option,
        click.option(
            "--window", type=click.IntRange(1), default=WINDOW, show_default=True,
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
        click.option("--engine", type=click.Choice(("compiled", "eager", "reference")), default="compiled"),
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
    if not value.isdecimal() or not 128 <= int(value) <= 1 << 20:
        raise click.BadParameter("auto, or a number from 128 to 1048576")
    return int(value)


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from cecompile.device import parse_size

    try:
        return parse_size(value)
    except ValueError:
        raise click.BadParameter("a number of bytes, with a unit such as MB, GB or GiB") from None


pipeline_option = click.option(
    "--pipeline", type=click.IntRange(1), default=1, show_default=True,
    help="Divide the layers among this many processes, which torchrun starts.",
)  # fmt: skip
