"""The 2024 contest's script: Phi-3-medium answers chat rows, and only Section 3 is timed.

    python scripts/contest_2024.py MODEL_DIR test_dataset.jsonl

The sections are those of the official script (cechallenge.github.io, assets/files/test_script.py): set up, warm-up,
then loading the data and inference against the clock, then accuracy. What it prints has the same form. The data is not
looked at before Section 3: the warm-up compiles and captures everything for prompts of up to --longest tokens, and a
compile cache filled before (`cecompile warm --task chat --max-depth N`) makes it short.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from cecompile import Answerer, ChatQuestion, read_questions
from cecompile.errors import CheckError, UserError
from cecompile.tasks.chat import NEW_TOKENS

WARM_UP_MESSAGES = (
    ("user", "Which fruits go well with bananas? Name two of them."),
    ("assistant", "Strawberries and mangoes do."),
    ("user", "Which of them is red?\nchoices: ['Strawberries', 'Mangoes']\n"),
)
WARM_UP = ChatQuestion("warm-up", WARM_UP_MESSAGES, None)


def main() -> None:
    options = _arguments()

    # Section 1. Set up
    answerer = Answerer.from_pretrained(
        options.model, device=options.device, dtype=options.dtype, engine=options.engine,
        memory_limit=options.memory_limit, new_tokens=options.max_new_tokens,
    )  # fmt: skip

    # Section 2. Warm-up
    answerer.warm_up([WARM_UP], options.longest)
    print(answerer.answer([WARM_UP]).answers[0].text)

    # Section 3. Load data and inference: what is timed
    start = time.time()
    questions = read_questions(options.data, "chat")
    outs = [[{"generated_text": answer.text}] for answer in answerer.answer(questions).answers]
    end = time.time()

    # Section 4. Accuracy
    print("===== Answers =====")
    correct = 0
    for question, out in zip(questions, outs, strict=True):
        answer = out[0]["generated_text"].lstrip().replace("\n", "")
        correct += answer == question.label
        print(answer)
    print("===== Perf result =====")
    print("Elapsed_time: ", end - start)
    print(f"Correctness: {correct}/{len(questions)}")
    if options.predictions:
        options.predictions.write_text("".join(json.dumps(out) + "\n" for out in outs))


def _arguments() -> Any:
    from cecompile.device import parse_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub id of the checkpoint")
    parser.add_argument("data", help="the rows: a .jsonl file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="compiled", help="compiled, eager, or reference: the official loop")
    parser.add_argument("--memory-limit", type=parse_size, help="such as 28GB")
    parser.add_argument("--max-new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest prompt to be ready for")
    parser.add_argument("--predictions", type=Path, help="file for the outputs, a line each")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (UserError, CheckError) as error:
        print(f"contest_2024: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
