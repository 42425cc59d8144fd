"""The report's files, as the command and the script of the hand-in write or refuse them."""

import re
import subprocess
from pathlib import Path

import pytest
from support.documents import has, pages
from support.runs import run_command as run
from support.runs import run_script

from cecompile.errors import UserError
from cecompile.report.document.document import command_line
from cecompile.report.document.words import Words
from cecompile.results.read import read_results
from cecompile.results.write import write_samples

SUBMISSION = Path(__file__).parents[1] / "scripts" / "submission.py"


# The command


def test_report_writes_both_beside_the_result(scored, tmp_path):
    for name in ("results.json", "samples.jsonl"):
        (tmp_path / name).write_bytes((scored / name).read_bytes())
    written = [tmp_path / "card.png", tmp_path / "report.pdf"]
    assert run("report", tmp_path, "--lang", "ko").splitlines() == list(map(str, written))
    assert "대회 규칙" in pages(written[1].read_bytes())
    again = run("report", tmp_path, exit_code=2)
    assert again == f"cecompile: {written[0]}: is there already; --overwrite replaces it\n"
    run("report", tmp_path, "--overwrite")
    assert "The rules" in pages(written[1].read_bytes())


def test_a_new_run_removes_the_old_ones_card(scored, tmp_path):
    for name in ("results.json", "card.png", "report.pdf"):
        (tmp_path / name).write_bytes(b"old")
    write_samples(tmp_path, [])
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def replaced(old: bytes, new: bytes):
    return lambda text: re.sub(old, new, text, count=1)


BROKEN = {
    "none": (None, "cannot be read: No such file or directory"),
    "cut off": (lambda text: text[:200], "damaged: "),
    "not UTF-8": (lambda text: b"\xff" + text, "damaged: not UTF-8"),
    "not a number": (replaced(rb'"runs": 1,', b'"runs": NaN,'), "damaged: NaN is no number"),
    "a list": (lambda text: b"[1]", "field 'schema': expected 1, found null"),
    "another schema": (replaced(rb'"schema": 1', b'"schema": 99'), "field 'schema': expected 1, found 99"),
    "no model": (replaced(rb'"model": {', b'"modal": {'), "field 'model': expected an object, found null"),
    "a text for a number": (
        replaced(rb'"strict": [\d.]+', b'"strict": "12 s"'),
        "field 'latency_s.strict': expected a number, found \"12 s\"",
    ),
    "an infinite time": (
        replaced(rb'"warmup": [\d.]+', b'"warmup": 1e999'),
        "field 'phases_s.warmup': expected a number up to 1e+15, found Infinity",
    ),
    "an unknown metric": (lambda text: text.replace(b'"acc', b'"bcc'), "field 'metrics': expected one of exact_match"),
    "no questions": (replaced(rb'"questions": 40', b'"questions": 0'), "field 'questions': expected at least 1"),
    "an unknown clock": (replaced(rb'"clock": "strict"', b'"clock": "x"'), "field 'headline.clock': expected one"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_result_is_refused_in_one_line(scored, tmp_path, case):
    change, message = BROKEN[case]
    if change is not None:
        (tmp_path / "results.json").write_bytes(change((scored / "results.json").read_bytes()))
    out = run("report", tmp_path, exit_code=2)
    assert len(out.splitlines()) == 1
    assert f"{tmp_path / 'results.json'}: " in out
    assert message in out
    assert not (tmp_path / "card.png").exists()
    with pytest.raises(UserError, match=re.escape(message)):
        read_results(tmp_path)


def test_one_path_for_both_files_is_refused(scored, tmp_path):
    how = ("report", scored, "--pdf", tmp_path / "x", "--png")
    assert "named for both" in run(*how, tmp_path / "x", exit_code=2)
    run(*how, tmp_path, exit_code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("png", "pdf", "words"),
    [
        ("x.png", "sub/../x.png", "named for both"),
        ("x.png", "link/x.png", "named for both"),
        ("old.png", "hard.png", "named for both"),
        ("result/report.pdf", None, "named for both"),
        ("result/results.json", None, "is results.json of the result"),
        ("x.png", "result/../result/samples.jsonl", "is samples.jsonl of the result"),
        ("result/predictions.jsonl", "x.pdf", "is predictions.jsonl of the result"),
        ("to results", "x.pdf", "is results.json of the result"),
    ],
)
def test_no_output_of_a_report_is_another_file_of_it(png, pdf, words, scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("result", "sub"):
        Path(folder).mkdir()
    for name in ("results.json", "samples.jsonl"):
        Path("result", name).write_bytes((scored / name).read_bytes())
    Path("link").symlink_to(".")
    Path("to results").symlink_to("result/results.json")
    Path("old.png").write_text("old")
    Path("hard.png").hardlink_to("old.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told = run("report", "result", "--overwrite", "--png", png, *([] if pdf is None else ["--pdf", pdf]), exit_code=2)
    assert words in told
    assert len(told.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# The folder to hand in


def test_submission(answered, tmp_path, capsys):
    out = tmp_path / "new" / "hand-in"
    assert run_script(SUBMISSION, answered, out, "--image", "docker.io/me/cecompile:final") == 0
    files = ["COMMAND.txt", "IMAGE.txt", "card.png", "predictions.jsonl", "report.pdf", "results.json", "samples.jsonl"]
    assert [str(out / name) for name in files] == capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in out.iterdir()) == files
    for name in ("results.json", "samples.jsonl", "predictions.jsonl"):
        assert (out / name).read_bytes() == (answered / name).read_bytes()
    has(pages((out / "report.pdf").read_bytes()), Words("ko")("title"), Words("en")("title"))
    assert (out / "COMMAND.txt").read_text().splitlines()[-1] == command_line(read_results(answered))[0]
    assert (out / "IMAGE.txt").read_text().splitlines() == [
        "docker build --tag cecompile .",
        "docker tag cecompile docker.io/me/cecompile:final",
        "docker push docker.io/me/cecompile:final",
        'docker run --rm --runtime nvidia -v cecompile-cache:/cache -v "$PWD/model:/model:ro" -v "$PWD/data:/data:ro" '
        "docker.io/me/cecompile:final contest /model /data/test_dataset.jsonl",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["hand-in"]


@pytest.mark.parametrize(
    ("result", "out", "image", "message"),
    [
        ("missing", "out", None, "results.json: cannot be read: No such file or directory"),
        (None, "full", None, "full: is there already; a new or an empty directory is needed"),
        (None, "out", "Me/Bad Name", "--image Me/Bad Name: not the name of a Docker image"),
        (None, "out", "x; rm -rf /", "not the name of a Docker image"),
    ],
)
def test_submission_says_what_is_wrong(answered, tmp_path, capsys, result, out, image, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    arguments = [tmp_path / result if result else answered, tmp_path / out, *(["--image", image] if image else [])]
    assert run_script(SUBMISSION, *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.process
def test_the_submission_script_is_a_shell_script_that_runs_it():
    assert subprocess.run(["bash", "-n", str(SUBMISSION.with_suffix(""))], check=False).returncode == 0
    assert SUBMISSION.with_suffix("").stat().st_mode & 0o111
