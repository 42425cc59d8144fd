"""Fuzzing what takes a user's bytes: the readers of datasets, the journal, and trees and packing behind them.

    python scripts/fuzz.py [TARGET ...] --seconds 600

Each target is a property over generated input: bad input may raise UserError, with one printable line, and nothing
else. With atheris installed, its coverage-guided mutations drive the generators; otherwise hypothesis does so alone,
in round after round until the time is up, and the first line says so. Exits with status 1 and the input if a target
fails. The tests run the same targets on a few examples.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

try:
    import atheris
except ImportError:
    atheris = None

with (
    atheris.instrument_imports(include=["cecompile.tasks", "cecompile.results.journal", "cecompile.workload"])
    if (atheris and __name__ == "__main__")
    else contextlib.nullcontext()
):
    from cecompile.errors import UserError
    from cecompile.results.journal import ANSWERS, NAME, PASSES, Journal, read
    from cecompile.tasks.chat import find_choices
    from cecompile.tasks.question import digest
    from cecompile.tasks.read import read_dataset
    from cecompile.workload.plan import choose_geometry, make_plan
    from cecompile.workload.sequences import Sequences
    from cecompile.workload.stage import stage_all

DIRECTORY = Path(tempfile.mkdtemp(prefix="cecompile-fuzz-"))
FIELDS = (
    "query", "choices", "gold", "id", "activity_label", "ctx_a", "ctx_b", "endings", "label", "question", "answerKey",
    "question_stem", "goal", "sol1", "sol2", "message", "answer", "role", "content", "text", "ind",
)  # fmt: skip
SHAPES: tuple[dict[str, Any], ...] = (
    {"query": "q", "choices": ["a", "b"], "gold": 0},
    {"activity_label": "l", "ctx_a": "a", "ctx_b": "b", "endings": ["x", "y"], "label": "1"},
    {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    {"message": [{"role": "user", "content": "x\nchoices: ['a', 'b']"}], "answer": "a"},
)
ODD_TEXTS = ("", " ", "[step]", "[1, 2]", "['a', 'b']", "\x1b[31m", "\u202e", "\ud800")
TEXT = st.text(max_size=20) | st.sampled_from(ODD_TEXTS)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def rows(draw: Any) -> list[Any]:
    """Rows of one known shape, some with a field changed, added or gone."""
    shape = draw(st.sampled_from(SHAPES))
    out: list[Any] = []
    for _ in range(draw(st.integers(1, 4))):
        row = dict(shape)
        for _ in range(draw(st.integers(0, 2))):
            row[draw(st.sampled_from(FIELDS))] = draw(VALUES)
        if draw(st.integers(0, 9)) == 0:
            row.pop(draw(st.sampled_from(sorted(row))))
        out.append(row)
    return out


def one_line(error: UserError) -> None:
    """Checks that an error is one short, printable line."""
    assert str(error).isprintable()
    assert len(str(error)) < 1000


def read_back(suffix: str, content: bytes) -> None:
    """Questions in the form that the rest relies on, or one printable line."""
    path = DIRECTORY / f"rows{suffix}"
    path.write_bytes(content)
    try:
        dataset = read_dataset(path)
    except UserError as error:
        one_line(error)
        return
    questions = list(dataset.questions)
    assert questions
    digest(questions)
    for question in questions:
        choices = question.choices
        if dataset.task == "chat":
            assert question.messages
            assert all(choice.strip() for choice in choices)
        else:
            assert len(choices) >= 2
            assert question.label is None or 0 <= question.label < len(choices)


@given(st.sampled_from([".jsonl", ".json"]), rows(), st.booleans())
def fuzz_rows(suffix: str, rows: list[Any], array: bool) -> None:
    """Rows that are nearly right."""
    lines = [json.dumps(row) for row in rows]
    read_back(suffix, (f"[{', '.join(lines)}]" if array else "\n".join(lines)).encode())


@given(st.sampled_from([".jsonl", ".json"]), rows(), st.binary(max_size=30), st.integers(0, 400), st.integers(0, 60))
def fuzz_bytes(suffix: str, rows: list[Any], inserted: bytes, at: int, removed: int) -> None:
    """Files with bytes exchanged."""
    content = "\n".join(map(json.dumps, rows)).encode()
    read_back(suffix, content[:at] + inserted + content[at + removed :])


@given(TEXT, st.text(alphabet="[]'\",\\ \n:choices01(){}#", max_size=60))
def fuzz_choices(before: str, listed: str) -> None:
    """Lists after `choices:` in a text."""
    found = find_choices(f"{before}\nchoices: [{listed}]")
    assert all(choice.strip() for choice in found)
    assert len(set(found)) == len(found)


RECORDS = st.tuples(st.sampled_from([PASSES, ANSWERS]), st.integers(0, 5), st.binary(max_size=40))
DAMAGE = st.tuples(st.integers(0, 2000), st.integers(0, 40), st.binary(max_size=20))


@given(st.lists(RECORDS, max_size=6), DAMAGE, st.lists(RECORDS, max_size=3))
def fuzz_journal(records: list[tuple[str, int, bytes]], damage: tuple[int, int, bytes], later: Any) -> None:
    """Written, damaged, resumed, added to, resumed again: what is kept is what was added before the damage."""
    path = DIRECTORY / NAME
    journal = Journal(DIRECTORY)
    journal.begin({"a": 1})
    for record in records:
        journal.add(*record)
    whole = path.read_bytes()
    ends = [end for *_, end in read(whole)]
    assert len(ends) == 1 + len(records)
    at, removed, inserted = damage
    damaged = whole[:at] + inserted + whole[at + removed :]
    first = next((i for i, (a, b) in enumerate(zip(whole, damaged, strict=False)) if a != b), len(damaged))
    kept = sum(end <= first for end in ends)
    path.write_bytes(damaged)
    os.close(journal._file or 0)
    found = list(read(damaged))
    assert [r[3] for r in found][:kept] == ends[:kept]
    assert [r[:3] for r in found[1:]] == records[: max(0, len(found) - 1)]
    try:
        again = Journal(DIRECTORY, resume=True)
    except UserError as error:
        one_line(error)
        path.unlink()
        if kept:
            raise
        return
    again.begin({"a": 1})
    for record in later:
        again.add(*record)
    assert [r[:3] for r in list(read(path.read_bytes()))[1:]] == [*(r[:3] for r in found[1:]), *later]
    again.remove()


@st.composite
def sequences(draw: Any) -> Sequences:
    """Token sequences over few tokens, so that many begin alike."""
    token = st.integers(0, 2)
    choices = st.lists(st.lists(token, min_size=1, max_size=8), min_size=1, max_size=6)
    questions = draw(st.lists(st.tuples(st.lists(token, min_size=1, max_size=25), choices), min_size=1, max_size=8))
    flat = [(number, context, choice) for number, (context, listed) in enumerate(questions) for choice in listed]
    tokens = [context + choice for _, context, choice in flat]
    return Sequences.of(tokens, [len(choice) for *_, choice in flat], [number for number, *_ in flat])


@given(sequences(), st.sampled_from([128, 256, 1024]), st.booleans())
def fuzz_packing(sequences: Sequences, tokens: int, blocks: bool) -> None:
    """Every predicted token is read out once, in its place, after its own path."""
    longest = int(sequences.input_lengths.max())
    geometry = choose_geometry(longest, tokens_per_bucket=tokens, blocks=blocks, readout_chunk=4)
    plan = make_plan(sequences, geometry)
    seen: list[list[int]] = [[] for _ in range(len(sequences))]
    for one in stage_all(plan):
        for choice, target in zip(one.choice.tolist(), one.target.tolist(), strict=True):
            seen[choice].append(target)
    assert seen == [sequences.targets(i).tolist() for i in range(len(sequences))]
    assert plan.prefix_tree_tokens <= plan.useful_tokens <= plan.unshared_tokens
    assert plan.useful_tokens <= plan.slots
    assert np.all(sequences.predicted > 0)


def raw_rows(content: bytes) -> None:
    """Any bytes as a file."""
    read_back((".jsonl", ".json")[len(content) % 2], content)


def raw_journal(content: bytes) -> None:
    """Any bytes as a journal that is resumed."""
    (DIRECTORY / NAME).write_bytes(content)
    try:
        journal = Journal(DIRECTORY, resume=True)
        journal.begin({"a": 1})
    except UserError as error:
        one_line(error)
        return
    journal.add(PASSES, 0, b"x")
    journal.remove()


TARGETS: dict[str, Callable[..., None]] = {
    "rows": fuzz_rows, "bytes": fuzz_bytes, "choices": fuzz_choices, "journal": fuzz_journal, "packing": fuzz_packing,
}  # fmt: skip
# What atheris mutates as it is, with what it begins from; the other targets' generators read its bytes as choices.
RAW: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "bytes": (raw_rows, lambda: [json.dumps(shape).encode() + b"\n" for shape in SHAPES]),
    "journal": (raw_journal, lambda: [some_journal()]),
}


QUIET: dict[str, Any] = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


def some_journal() -> bytes:
    """A journal with a few records."""
    with Journal(DIRECTORY) as journal:
        journal.begin({"a": 1})
        for i in range(3):
            journal.add(PASSES, i, bytes(range(8 * i)))
        content = journal.path.read_bytes()
        journal.remove()
    return content


def main() -> int:
    """Fuzzes the targets one after another, each for its share of the time; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    options = parser.parse_args()
    unknown = set(options.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no target {', '.join(sorted(unknown))}")
    chosen = options.targets or list(TARGETS)
    if atheris is None:
        print("atheris is not installed: hypothesis alone, in rounds")
        return max(hypothesis_for(name, options.seconds) for name in chosen)
    if len(chosen) == 1:
        return atheris_for(chosen[0], options.seconds)
    command = [sys.executable, __file__, "--seconds", str(options.seconds)]
    return max(subprocess.run([*command, name]).returncode for name in chosen)  # it ends the process it runs in


def hypothesis_for(name: str, seconds: int) -> int:
    """Rounds of a thousand examples until the time is up; raises what a target raises, with the smallest input."""
    began = time.monotonic()
    rounds = 0
    target = settings(**QUIET, max_examples=1000)(TARGETS[name])
    while time.monotonic() - began < seconds:
        seed(rounds)(target)()
        rounds += 1
    print(f"{name}: {1000 * rounds} examples in {seconds} s")
    return 0


def atheris_for(name: str, seconds: int) -> int:
    """Does not return: libFuzzer ends the process, with its own status if a target fails."""
    if name in RAW:
        one, seeds = RAW[name][0], RAW[name][1]()
    else:
        options = settings(**QUIET, phases=[Phase.generate])
        one = options(TARGETS[name]).hypothesis.fuzz_one_input  # type: ignore[attr-defined]
        seeds = [np.random.default_rng(i).bytes(1024) for i in range(50)]
    print(f"{name}: atheris for {seconds} s", flush=True)
    corpus = DIRECTORY / "corpus"
    corpus.mkdir()
    for i, content in enumerate(seeds):
        (corpus / str(i)).write_bytes(content)
    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-len_control=0", "-timeout=20"]
    atheris.Setup([*arguments, f"-artifact_prefix={DIRECTORY}/", str(corpus)], one, enable_python_coverage=True)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
