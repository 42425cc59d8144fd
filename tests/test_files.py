"""A file is what it holds now, under exactly its name, whatever caches and patterns would make of it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.rows import ROWS, write_rows, write_table
from support.runs import results, run_command

from cecompile import read_questions
from cecompile.errors import UserError
from cecompile.tasks.question import digest
from cecompile.tasks.read import read_windows
from cecompile.tasks.windows import Windows

KINDS = ("csv", "parquet", "jsonl", "json")
OLD, NEW = ROWS[:6], [row | {"query": row["query"].replace("Question", "Querying")} for row in ROWS[:6]]


def write_old_and_new(path: Path) -> str:
    """Writes a file, lets it be read, and replaces its content by other content of the same size and time."""
    write_table(path, OLD)
    os.utime(path, (10**9, 10**9))
    before, found = digest(read_questions(path)), path.stat()
    write_table(path, NEW)
    os.utime(path, (10**9, 10**9))
    assert path.stat().st_mtime_ns == found.st_mtime_ns
    if path.suffix != ".parquet":
        assert path.stat().st_size == found.st_size
    return before


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_rewritten_with_the_same_time_is_read_again(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    before = write_old_and_new(path)
    questions = read_questions(path)
    assert [question.context for question in questions] == [row["query"] for row in NEW]
    large = read_windows(path, "auto", None, 4)
    assert isinstance(large.questions, Windows)
    assert large.questions.digest == digest(questions) != before


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_copy_with_the_time_of_another_is_read_itself(kind, tmp_path):
    """As `cp -p` and `tar` leave it, in the place of a file that was read before."""
    old, new = tmp_path / f"rows.{kind}", tmp_path / f"new.{kind}"
    write_table(old, OLD)
    write_table(new, NEW)
    os.utime(new, ns=(old.stat().st_atime_ns, old.stat().st_mtime_ns))
    read_questions(old)
    os.replace(shutil.copy2(new, tmp_path / "copy"), old)
    assert read_questions(old) == read_questions(new)


def test_a_plan_and_a_result_are_of_the_file_as_it_is(tiny_llama, tmp_path):
    path = tmp_path / "rows.csv"
    how = ["--model", tiny_llama, "--data", path, "--device", "cpu", "--engine", "eager"]
    write_table(path, OLD)
    os.utime(path, (10**9, 10**9))
    plan = json.loads(run_command("plan", *how, "--json"))
    write_table(path, OLD[:3])
    os.utime(path, (10**9, 10**9))
    assert json.loads(run_command("plan", *how, "--json"))["useful_tokens"] < plan["useful_tokens"]
    run_command("eval", *how, "--output", tmp_path / "out")
    assert results(tmp_path / "out")["questions"] == 3
    assert results(tmp_path / "out")["data"]["digest"] == digest(read_questions(path))


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_file_that_changes_between_the_windows_is_refused_whatever_its_time(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    write_table(path, OLD)
    os.utime(path, (10**9, 10**9))
    large = read_windows(path, "auto", None, 4)
    write_table(path, NEW)
    os.utime(path, (10**9, 10**9))
    with pytest.raises(UserError, match="changed while it was read"):
        list(large.questions)


PATTERNS = {
    "rows[1]": "rows1", "rows*": "rows1", "rows?": "rows1", "{rows,other}": "rows", "[!a]": "b", "rows[0-9]": "rows1",
    "**": "rows", "~": "rows", "a,b": "a", "rows 1": "rows", "-rows": "rows", "%72ows": "rows", "rows#1": "rows",
    "train": "rows", "$HOME": "rows", "\u202erows\n": "rows", "owner:name": "owner", "\udcff": "rows",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_name_is_no_pattern(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table(Path(f"{name}.{kind}"), NEW)
    alone = read_questions(f"{name}.{kind}")
    write_table(Path(f"{PATTERNS[name]}.{kind}"), OLD)
    assert read_questions(f"{name}.{kind}") == alone
    assert [question.context for question in alone] == [row["query"] for row in NEW]
    os.remove(f"{name}.{kind}")
    with pytest.raises(UserError, match="no such file"):
        read_questions(f"{name}.{kind}")


def test_no_other_name_is_a_pattern(tiny_llama, tmp_path, monkeypatch):
    """Of a model, a result, a baseline and a report, each beside another that the pattern would match."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "model[1]")
    Path("model1").mkdir()
    Path("out1").mkdir()
    write_table(Path("rows[1].csv"), OLD)
    how = ["eval", "--model", "model[1]", "--data", "rows[1].csv", "--device", "cpu", "--engine", "eager"]
    run_command(*how, "--output", "out[1]")
    run_command(*how, "--output", "out*", "--baseline", "out[1]")
    assert results(Path("out*"))["comparison"]["baseline"] == "out[1]"
    run_command("compare", "out[1]", "out*")
    run_command("report", "out[1]", "--png", "card[1].png")
    assert Path("card[1].png").is_file()
    assert not list(Path("out1").iterdir())


def test_questions_are_no_file_of_the_results(tiny_llama, tmp_path):
    how = ["eval", "--model", tiny_llama, "--device", "cpu", "--engine", "eager", "--output", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    for name in ("samples.jsonl", "../out/samples.jsonl", "link.jsonl"):
        write_rows(tmp_path / "out" / "samples.jsonl", OLD)
        (tmp_path / "out" / "link.jsonl").unlink(missing_ok=True)
        (tmp_path / "out" / "link.jsonl").symlink_to("samples.jsonl")
        said = run_command(*how, "--overwrite", "--data", tmp_path / "out" / name, exit_code=2)
        assert "is a file of the results in --output" in said
        assert read_questions(tmp_path / "out" / "samples.jsonl")
