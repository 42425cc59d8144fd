"""The 2024 contest's script as a command: its sections, its printed lines and its output, for any model and rows.

The sections are those of the official script (cechallenge.github.io, assets/files/test_script.py): set up, warm-up,
then loading the data and inference against the clock, then accuracy. The data is not looked at before Section 3: the
warm-up compiles and captures everything for prompts of up to `--longest` tokens.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cecompile.cli_options import MOST, begin_reading, new_tokens_option, running
from cecompile.errors import writing
from cecompile.imports import import_transformers
from cecompile.tasks.chat import ChatQuestion, judge_answer

if TYPE_CHECKING:
    from cecompile.run.answerer import Answerer

LONGEST = 1024  # the longest row that the contest has published has about 900 tokens
WARM_UP = ChatQuestion(
    "warm-up",
    (
        ("user", "Which fruits go well with bananas? Name two of them."),
        ("assistant", "Strawberries and mangoes do."),
        ("user", "Which of them is red?\nchoices: ['Strawberries', 'Mangoes']\n"),
    ),
    None,
)


@click.command("contest")
@click.argument("model", metavar="DIR|HUB_ID")
@click.argument("data", metavar="FILE")
@running
@new_tokens_option
@click.option("--require-warm", is_flag=True, help="Fail (exit 1) if something would have to be compiled.")
@click.option(
    "--longest", type=click.IntRange(1, MOST), default=LONGEST, show_default=True,
    help="Tokens of the longest prompt to be ready for before the data is looked at.",
)  # fmt: skip
@click.option("--predictions", type=click.Path(path_type=Path), help="File for the pipeline's outputs, a line each.")
def contest_command(
    model: str, data: str, max_new_tokens: int, longest: int, predictions: Path | None, **how: Any
) -> None:
    """Answer the contest's chats as its official script does, and print what that script prints.

    Timed are loading the data and inference: every answer is written before the time is taken.
    """
    begin_reading(model)
    import_transformers("cecompile.run.answerer")
    from cecompile.run.answerer import Answerer

    # Section 1. Set up
    answerer = Answerer.from_pretrained(model, new_tokens=max_new_tokens, **how)
    outputs = run_sections(answerer, data, longest)
    if predictions is not None:
        with writing(predictions):
            predictions.write_text("".join(json.dumps(out) + "\n" for out in outputs), encoding="utf-8")


def run_sections(answerer: "Answerer", data: str, longest: int = LONGEST) -> list[list[dict[str, str]]]:
    """Runs the script's Sections 2 to 4 and prints their lines.

    Args:
        answerer: the outcome of Section 1.
        data: the rows' file.
        longest: tokens of the longest prompt to warm up for.

    Returns:
        The rows' answers, each in the form of `transformers`' text-generation pipeline.

    Raises:
        UserError, CheckError: see `Answerer.answer`.
    """
    from cecompile.tasks.read import read_questions

    # Section 2. Warm-up
    answerer.warm_up([WARM_UP], longest)
    click.echo(answerer.answer([WARM_UP]).answers[0].text)

    # Section 3. Load data and inference: what is timed
    start = time.time()
    questions = read_questions(data, "chat")
    outputs = [[{"generated_text": answer.text}] for answer in answerer.answer(questions).answers]
    end = time.time()

    # Section 4. Accuracy
    click.echo("===== Answers =====")
    correct = 0
    for question, output in zip(questions, outputs, strict=True):
        text = output[0]["generated_text"]
        correct += bool(judge_answer(question, text, None, None).correct)
        click.echo(text.lstrip().replace("\n", ""))
    click.echo("===== Perf result =====")
    click.echo(f"Elapsed_time:  {end - start}")
    click.echo(f"Correctness: {correct}/{len(questions)}")
    if answerer.runtime.mode.note:
        click.echo(f"cecompile: {answerer.runtime.mode.note}", err=True)
    return outputs
