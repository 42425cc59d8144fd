"""Rows of data: made ones, files of them, and the real inputs where they are at hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cecompile import ChatQuestion
from cecompile.workload.sequences import Sequences

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [
    {"query": f"Question {i} is", "choices": ["short", "rather longer " * 4, "x"], "gold": i % 3} for i in range(40)
]
CHATS = [
    {"message": [{"role": "user", "content": f"question: who is number {i}?\nchoices: ['it', 'they']"}], "answer": "it"}
    for i in range(12)
]
MANY_ROWS = [
    {"query": f"Question {i} is", "choices": ["short", f"rather longer {i} " * 3, "x"], "gold": i % 3}
    for i in range(160)
]


def shared_file(name: str) -> Path:
    """A real input beside the project; skips the test where it is absent."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside this checkout")
    return path


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_table(path: Path, rows=ROWS) -> Path:
    """Writes rows in the form that the file's name ends in: .jsonl, .json, .csv or .parquet."""
    if path.suffix == ".jsonl":
        write_rows(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            nested = (list, dict)
            writer.writerows({k: json.dumps(v) if isinstance(v, nested) else v for k, v in row.items()} for row in rows)
    else:
        import pyarrow
        from pyarrow import parquet

        with path.open("wb") as file:  # pyarrow would take some names for addresses
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return path


def random_questions(count: int, seed: int, context: tuple[int, int], prefix: int = 0, vocabulary=1000) -> Sequences:
    """Questions of four choices of 5 to 39 random tokens; the contexts' lengths are drawn, after a shared prefix."""
    random = np.random.default_rng(seed)
    common = random.integers(0, vocabulary, prefix)
    parts, readouts = [], []
    for _ in range(count):
        trunk = np.concatenate([common, random.integers(0, vocabulary, random.integers(*context))])
        for _ in range(4):
            n = int(random.integers(5, 40))
            parts.append(np.concatenate([trunk, random.integers(0, vocabulary, n)]))
            readouts.append(n)
    return Sequences.of(parts, readouts, np.repeat(np.arange(count), 4))


def ask(text: str, id: str = "0", label: str | None = None, before=()) -> ChatQuestion:
    return ChatQuestion(id, (*before, ("user", text)), label)


TWENTY = [f"answer number {i}" for i in range(20)]
MADE_UP = [
    ask("question: quotes?\nchoices: [\"it's\", 'a \"quoted\" word', 'plain']\n"),
    ask("question: brackets?\nchoices: ['[a]', ']', '[', 'b, c']\n"),
    ask("question: one?\nchoices: ['the only one']"),
    ask(f"question: twenty?\nchoices: {TWENTY}\n"),
    ask("question: prefixes?\nchoices: ['red', 'red bread', 'red bread table', 're', 'r']\n"),
    ask("question: numbers?\nchoices: [1, 10, 100, 1.5, True, False]\n"),
    ask(""),
    ask("\n"),
    ask("no list at all, only a text that asks for something"),
    ask("choices: ['cut', 'off'"),
    ask("choices: [__import__('os').system('true'), 'b']"),
    ask("Ünïcödé — 漢字 🙂\nchoices: ['ist schön', 'は良い', '🙂🙂']\n"),
    ask("and now?\nchoices: ['a', 'b']", before=[("user", "first"), ("assistant", "then"), ("user", "more")]),
    ask("with a system\nchoices: ['yes', 'no']", before=[("system", "You choose.")]),
    ChatQuestion("0", (("user", "go on\nchoices: ['well then', 'well now']"), ("assistant", "well")), None),
    ask("<|end|> and <|assistant|> written out\nchoices: ['<|end|>', 'a<|end|>b', '<s>']"),
    ask("the same twice\nchoices: ['a', 'b']"),
    ask("the same twice\nchoices: ['a', 'b']"),
]
