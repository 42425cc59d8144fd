"""Checking and comparing results: each broken rule is found and named, and two results are set side by side."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import WEIGHTS, add_tokenizer, change_json, save_demo_llama, tensors_of
from support.rows import ROWS, write_rows
from support.runs import json_lines, results
from support.runs import run_command as run
from support.runs import samples as samples_of
from transformers import AutoModelForCausalLM

from cecompile import Scorer, demo, evaluate, read_questions
from cecompile.engine.attention import TreeMasks, dense
from cecompile.errors import CheckError, UserError
from cecompile.model.unchanged import EQUAL
from cecompile.results.check import problems
from cecompile.results.clock import Clock
from cecompile.results.compare import compare_directories, paired_drop, read_baseline
from cecompile.results.read import read_result
from cecompile.results.write import digest_of_results, file_digests
from cecompile.tasks.judge import metrics

LIMIT = 8  # questions of the demo


def score(output: Path, *arguments, engine: str = "eager", limit: int = LIMIT, exit_code: int = 0) -> str:
    common = ("eval", "--device", "cpu", "--engine", engine, "--limit", limit, "--tokens-per-bucket", 512)
    return run(*common, "--output", output, *arguments, exit_code=exit_code)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the results of this module are: the demo's first questions by each engine."""
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def reference(place) -> Path:
    score(place / "reference", engine="reference")
    return place / "reference"


@pytest.fixture(scope="module")
def eager(place) -> Path:
    score(place / "eager")
    return place / "eager"


@pytest.fixture(scope="module")
def compiled(place, reference) -> Path:
    score(place / "compiled", "--baseline", reference, engine="compiled")
    return place / "compiled"


def forged(
    directory: Path, copy: Path, change=lambda results: None, samples=lambda row: None, judged: bool = False
) -> Path:
    """A copy of a result, changed, with digests, and metrics where it is `judged`, that fit the change."""
    shutil.copytree(directory, copy)
    rows = samples_of(copy)
    for row in rows:
        samples(row)
    write_rows(copy / "samples.jsonl", rows)
    content = results(copy)
    change(content)
    if judged:
        content["metrics"] = metrics(read_result(copy).samples)
    content["samples_digest"] = file_digests(copy)
    content["digest"] = digest_of_results(content)
    (copy / "results.json").write_text(json.dumps(content))
    return copy


def edited(directory: Path, copy: Path, file: str, change) -> Path:
    """A copy of a result; the text of one file is changed, and no digest."""
    shutil.copytree(directory, copy)
    (copy / file).write_text(change((copy / file).read_text()))
    return copy


# What a result says of itself


@pytest.mark.compiles
def test_results_say_what_ran(compiled):
    r, model = results(compiled), results(compiled)["model"]
    assert (model["device_fingerprint"], model["verified"]) == (model["fingerprint"], EQUAL)
    assert model["stored_dtypes"] == {"float32": model["parameters"]}
    assert model["changed"] == {
        "attention": "cecompile_dense",
        "compiled": {"LlamaDecoderLayer": 3, "LlamaRMSNorm": 1},
        "replaced_modules": [],
    }
    assert r["command"][:2] == ["cecompile", "eval"]
    assert r["date"].endswith("+00:00")
    digest = hashlib.sha256((compiled / "samples.jsonl").read_bytes()).hexdigest()
    assert r["samples_digest"] == {"samples.jsonl": digest}
    assert r["digest"] == digest_of_results(r)
    assert len(r["warmed"]) == len(r["plan"]["buckets"])
    assert [phase for phase, *_ in r["timeline"]][-2:] == ["inference", "score"]


def test_the_reference_engine_changes_nothing(reference):
    assert results(reference)["model"]["changed"] == {"attention": None, "compiled": {}, "replaced_modules": []}


def test_results_hold_together(reference, eager, compiled):
    assert [problems(directory) for directory in (reference, eager, compiled)] == [[], [], []]


# Results that were edited, or are not what they seem


def test_results_edited(eager, tmp_path):
    change = ('"acc": 1.0', '"acc": 0.75', 1)
    found = problems(edited(eager, tmp_path / "out", "results.json", lambda text: text.replace(*change)))
    assert found[0] == "results.json: was edited: its digest is another"
    assert found[1] == "results.json: metrics.acc is 0.75, samples.jsonl gives 1.0"


def test_samples_edited(eager, tmp_path):
    change = ('"prediction": 1', '"prediction": 0', 1)
    found = problems(edited(eager, tmp_path / "out", "samples.jsonl", lambda text: text.replace(*change)))
    assert found[0] == "samples.jsonl: was edited: its digest is not the one in results.json"
    assert any("is not the choice of the highest loglikelihood" in problem for problem in found)


def test_warm_up_booked_as_preprocessing(tiny_llama, tmp_path):
    class Generous(Clock):
        def enter(self, phase: str, at: float | None = None) -> None:
            super().enter("preprocess" if phase == "warmup" else phase, at)

    scorer = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager", tokens_per_bucket=256)
    questions = read_questions(write_rows(tmp_path / "rows.jsonl", ROWS[:6]))
    evaluate(scorer, questions, clock=Generous(), output=tmp_path / "out")
    (found,) = problems(tmp_path / "out")
    assert found.startswith("results.json: warmed: ")
    assert found.endswith("booked as preprocess")


def without(part: str, field: str):
    return lambda r: r[part].pop(field)


FORGERIES = {
    "latency": (lambda r: r["latency_s"].update(strict=0.1), "latency_s.strict is 0.1, the phases give"),
    "headline": (lambda r: r["headline"].update(seconds=0.1), "is not the latency 'strict'"),
    "phases": (lambda r: r["phases_s"].update(warmup=0.1), "phases_s.warmup is 0.1, the timeline gives"),
    "gap": (lambda r: r["timeline"].remove(max(r["timeline"][:-1], key=lambda one: one[2] - one[1])), "begins at"),
    "never warm": (lambda r: r["warmed"].clear(), "was never warmed up"),
    "device": (lambda r: r["model"].update(device_fingerprint="0" * 64), "other weights ran than were stored"),
    "precision": (lambda r: r["model"].update(dtype="float16"), "float16 is a lower precision than the checkpoint's"),
    "questions": (lambda r: r.update(questions=100), f"{LIMIT} samples of 100 questions"),
    "plan": (lambda r: r.update(plan=None), "plan: missing with the eager engine"),
    "engine": (lambda r: r["engine"].update(name="compiled"), "changed.compiled: {} with the compiled engine"),
    "slots": (lambda r: r["plan"].update(slots=10), "plan.slots is 10"),
    "memory": (lambda r: r["memory"].update(limit_bytes=1), "is above the limit 1"),
    "metric": (lambda r: r["metrics"].update(acc_norm=0.5), "metrics.acc_norm is 0.5, samples.jsonl gives"),
    "missing": (without("model", "changed"), "weights cannot be checked: KeyError: 'changed'"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_whose_digests_fit(name, eager, tmp_path):
    change, message = FORGERIES[name]
    found = problems(forged(eager, tmp_path / "out", change))
    assert any(message in problem for problem in found), found
    assert not any("digest is" in problem for problem in found)


def test_labels_exchanged_in_the_samples(eager, tmp_path):
    copy = forged(eager, tmp_path / "out", samples=lambda row: row.update(label=(row["label"] + 1) % 4))
    assert "results.json: metrics.acc is 1.0, samples.jsonl gives 0.0" in problems(copy)


# Comparing


def test_the_drop_and_its_interval():
    before = [True] * 8 + [False] * 2
    now = [True] * 6 + [False] * 3 + [True]
    d = [0] * 6 + [1, 1, 0, -1]
    drop, interval = paired_drop(before, now)
    assert drop == pytest.approx(10)
    spread = math.sqrt(sum((x - 0.1) ** 2 for x in d) / 9)
    half = 100 * 1.959964 * spread / math.sqrt(10)
    assert interval == pytest.approx([10 - half, 10 + half])
    assert paired_drop([True, None], [True, True]) == (None, None)
    assert paired_drop([True], [False]) == (100, None)


def test_compiled_against_the_reference(compiled, reference):
    compared = json.loads(run("compare", reference, compiled, "--json"))
    assert compared["drop_points"] == {"acc": 0, "acc_norm": 0}
    assert compared["agreement"] == 1
    assert 0 < compared["largest_difference"] < 1e-3
    assert compared["differences"] == compared["failed"] == []
    ratio = results(reference)["latency_s"]["inference"] / results(compiled)["latency_s"]["inference"]
    assert compared["inference_speed_ratio"] == pytest.approx(ratio)
    own = results(compiled)["comparison"]
    assert (own["verdict"], own["drop_points"]) == ("within", {"acc": 0, "acc_norm": 0})
    assert own["baseline"] == str(reference)


def test_half_precision_against_float32(tmp_path):
    """The same files, in the precision that they are stored in and in a higher one."""
    AutoModelForCausalLM.from_pretrained(demo.MODEL).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        score(tmp_path / dtype, "--model", tmp_path / "model", "--dtype", dtype)
    compared = compare_directories(tmp_path / "float32", tmp_path / "bfloat16", max_drop=20)
    assert compared["failed"] == []
    assert 1e-3 < compared["largest_difference"] < 2
    assert results(tmp_path / "float32")["model"]["verified"] == f"{EQUAL}, converted to float32"
    assert results(tmp_path / "bfloat16")["model"]["verified"] == EQUAL


def test_lower_precision_than_the_checkpoints(reference, tmp_path):
    score(tmp_path / "out", "--dtype", "bfloat16", "--baseline", reference, "--max-drop", 100)
    compared = run("compare", reference, tmp_path / "out", "--max-drop", 100, exit_code=1)
    assert "bfloat16 is a lower precision than the checkpoint's float32" in compared


def all_see_all(self, window, dtype):
    """Every branch sees those before it."""
    slots = self._part["end"].shape[1]
    visible = torch.ones(len(self._part["end"]), slots, slots, dtype=torch.bool).tril()
    return dense(visible, dtype)


@pytest.mark.parametrize("since", ["the start", "warmup", "inference"])
def test_a_damaged_mask(since, reference, monkeypatch, tmp_path):
    """The probe refuses it, else the check of the warm engine does; where neither sees it, comparing does."""
    scorer = Scorer.from_pretrained(device="cpu", engine="eager", tokens_per_bucket=128)

    def damage(phase: str, *_: int) -> None:
        if since == phase:
            monkeypatch.setattr(TreeMasks, "_dense_mask", all_see_all)

    def damaged():
        options = {"data": str(demo.HELLASWAG), "task": "hellaswag", "baseline": read_baseline(reference)}
        return evaluate(scorer, read_questions(demo.HELLASWAG, limit=LIMIT), progress=damage, **options)

    damage("the start")
    if since == "the start":
        with pytest.raises(UserError, match=r"cannot be scored as trees .*logits differ"):
            damaged()
    elif since == "warmup":
        with pytest.raises(CheckError, match="times as far from the stock model as rounding explains"):
            damaged()
    else:
        comparison = damaged().results["comparison"]
        assert comparison["verdict"] == "past"
        assert comparison["agreement"] < 1
        assert comparison["largest_difference"] > 1


def test_a_drop_is_shown_question_by_question(reference, eager, tmp_path):
    def worse(row: dict) -> None:
        row["id"] = "\x1b[2J" + row["id"]
        if row["id"].endswith(("0", "3")):
            row["loglikelihoods"][row["label"]] -= 100
            row["prediction"] = row["loglikelihoods"].index(max(row["loglikelihoods"]))

    before = forged(reference, tmp_path / "before", samples=lambda row: row.update(id="\x1b[2J" + row["id"]))
    after = forged(eager, tmp_path / "worse", samples=worse, judged=True)
    out = run("compare", before, after, exit_code=1)
    assert "acc dropped by 25.00 points" in out
    assert out.count("\\x1b[2J") == 2
    assert "\x1b" not in out
    run("compare", before, after, "--max-drop", 25)


OTHERS = {
    "task": (lambda r: r.update(task="choices"), "another task"),
    "shuffled labels": (lambda r: r["data"].update(digest="0" * 64), "another data"),
    "subset": (lambda r: r.update(questions=4), "another number of questions"),
    "tokenizer": (lambda r: r["model"].update(tokenizer_digest="0" * 64), "another tokenizer"),
    "model": (lambda r: r["model"].update(fingerprint="0" * 64), "another model"),
    "old": (without("model", "tokenizer_digest"), "field 'model.tokenizer_digest': missing"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_results_of_something_else_are_refused(name, reference, eager, tmp_path):
    change, message = OTHERS[name]
    out = run("compare", reference, forged(eager, tmp_path / "out", change), exit_code=2)
    assert message in out
    assert len(out.splitlines()) == 1


def test_what_is_no_result_is_refused(eager, tmp_path):
    assert "results.json: cannot be read" in run("compare", eager, tmp_path, exit_code=2)
    for file, line, message in (
        ("results.json", "[1]", "results.json: not an object"),
        ("samples.jsonl", "{", "samples.jsonl: line 1: not valid JSON"),
        ("samples.jsonl", '{"id": "0"}', "samples.jsonl: line 1: field 'label': missing"),
    ):
        copy = edited(eager, tmp_path / f"{file}-{len(line)}", file, lambda _, line=line: line)
        assert message in run("compare", eager, copy, exit_code=2)


# A baseline


def refused(output: Path, *arguments, **options) -> str:
    out = score(output, *arguments, exit_code=2, **options)
    assert not output.exists()
    assert len(out.splitlines()) == 1
    return out


def demo_rows(change, file: Path) -> Path:
    rows = json_lines(demo.HELLASWAG)[:LIMIT]
    for row in rows:
        change(row)
    return write_rows(file, rows)


def test_a_baseline_of_other_questions_is_refused(reference, tmp_path):
    shuffled = demo_rows(lambda row: row.update(label=(int(row["label"]) + 1) % 4), tmp_path / "shuffled.jsonl")
    other = demo_rows(lambda row: row.update(ctx_a=row["ctx_a"] + " again"), tmp_path / "other.jsonl")
    for data in (shuffled, other):
        assert "another data" in refused(tmp_path / "out", "--data", data, "--baseline", reference)
    assert "another number of questions" in refused(tmp_path / "out", "--baseline", reference, limit=LIMIT - 1)


def test_a_baseline_of_another_tokenizer_is_refused_before_weights_are_read(reference, tmp_path):
    model = shutil.copytree(demo.MODEL, tmp_path / "model")
    (model / WEIGHTS).unlink()
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    change_json(model / "tokenizer.json", model=tokenizer | {"merges": tokenizer["merges"][:-1]})
    assert "another tokenizer" in refused(tmp_path / "out", "--model", model, "--baseline", reference)


def test_a_baseline_of_another_model_is_refused(reference, tmp_path):
    other = save_demo_llama(tmp_path / "other")
    (other / WEIGHTS).unlink()  # what differs in size is refused without it
    out = refused(tmp_path / "out", "--model", other, "--baseline", reference)
    assert "another model" in out
    assert "model.parameters" in out
    model = shutil.copytree(demo.MODEL, tmp_path / "model")
    with tensors_of(model) as tensors:
        tensors["model.norm.weight"][0] += 1e-6
    assert "not the same model" in refused(tmp_path / "out", "--model", model, "--baseline", reference)


def test_a_baseline_that_was_edited_is_refused(eager, tmp_path):
    baseline = edited(eager, tmp_path / "baseline", "samples.jsonl", lambda text: text + "\n")
    assert "samples.jsonl: was edited" in score(tmp_path / "out", "--baseline", baseline, exit_code=1)


def test_past_the_baseline_the_results_are_written_and_the_run_fails(tiny_llama, tmp_path):
    def right(row: dict) -> None:
        row["loglikelihoods"][row["label"]] += 1000
        row.update(prediction=row["label"], prediction_norm=row["label"])

    data = write_rows(tmp_path / "rows.jsonl", ROWS[:6])
    score(tmp_path / "first", "--model", tiny_llama, "--data", data)
    baseline = forged(tmp_path / "first", tmp_path / "baseline", samples=right, judged=True)
    assert problems(baseline) == []
    acc = results(tmp_path / "first")["metrics"]["acc"]
    assert acc < 1
    out = score(tmp_path / "out", "--model", tiny_llama, "--data", data, "--baseline", baseline, exit_code=1)
    assert f"past --max-drop against {baseline}; results in {tmp_path / 'out'}" in out
    comparison = results(tmp_path / "out")["comparison"]
    assert comparison["verdict"] == "past"
    assert comparison["drop_points"]["acc"] == pytest.approx(100 * (1 - acc))
    assert problems(tmp_path / "out") == []
    run("compare", baseline, tmp_path / "out", "--max-drop", 100)


# Chats


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("chats")
    for engine in ("reference", "eager"):
        score(directory / engine, "--task", "chat", "--max-new-tokens", 24, engine=engine, limit=2)
    return directory / "reference", directory / "eager"


def test_chats_compare_by_their_texts(chats, tmp_path):
    compared = compare_directories(*chats)
    assert compared["drop_points"] == {"exact_match": 0}
    assert compared["largest_difference"] is None
    assert compared["failed"] == []
    first = samples_of(chats[1])[0]
    change = (first["text"], "x", 1)
    found = problems(edited(chats[1], tmp_path / "copy", "predictions.jsonl", lambda text: text.replace(*change)))
    assert "predictions.jsonl: was edited: its digest is not the one in results.json" in found
    assert "predictions.jsonl: other texts than in samples.jsonl" in found
