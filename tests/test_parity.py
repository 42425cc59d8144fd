"""Our scores against lm-evaluation-harness itself, and against the reference engine."""

import lm_eval
import numpy as np
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import process_docs
from support.rows import shared_file, write_rows

import cecompile
from cecompile import demo

TOLERANCE = 1e-3  # natural logarithm, float32


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory, rows_with_everything):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows_with_everything)


@pytest.fixture(scope="session")
def wikihow_file(tmp_path_factory):
    """HellaSwag rows with the marks that its WikiHow half carries."""
    contexts = [
        ("Health", "[header] How to rest [title] Sit  down. [step] Take a chair", "and"),
        ("Finance", "[header] How to save. [substeps] Put a coin", "in the jar, then"),
        ("Baking bread", "A man stands in a kitchen. He  kneads the dough.", "the man"),
        ("Sailing", "A boat is on the lake.", ""),
    ]
    endings = ["[title] Wait for it.", "  walks away  from it.", "eats [substeps] the bread.", "is gone [step]."]
    rows = [
        {"activity_label": activity, "ctx_a": a, "ctx_b": b, "ind": i, "label": i % 4,
         "endings": endings[i % 4 :] + endings[: i % 4]}
        for i, (activity, a, b) in enumerate(contexts * 3)
    ]  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("wikihow") / "rows.jsonl", rows)


def harness(model_dir, data, hellaswag: bool):
    """lm_eval's own samples: per question (loglikelihoods, greedy flags, acc, acc_norm), and its results."""
    config = {
        "task": "ours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation", "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "{{gold}}",
    }  # fmt: skip
    config |= {"doc_to_target": "{{label}}", "process_docs": process_docs} if hellaswag else {}
    model = HFLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=4)
    tasks = [ConfigurableTask(config=config)]
    only = TaskManager(include_defaults=False)  # reading the harness's tasks, all of them, takes long
    out = lm_eval.simple_evaluate(model=model, tasks=tasks, log_samples=True, bootstrap_iters=0, task_manager=only)
    samples = sorted(out["samples"]["ours"], key=lambda s: s["doc_id"])
    answers = [tuple(zip(*(r[0] for r in s["resps"]), strict=True)) for s in samples]
    return [(*a, s["acc"], s["acc_norm"]) for a, s in zip(answers, samples, strict=True)], out["results"]["ours"]


@pytest.mark.compiles
@pytest.mark.parametrize("which", ["tiny", "demo"])
@pytest.mark.parametrize("kind", ["rows", "wikihow"])
def test_equals_lm_eval(which, kind, tiny_llama, rows_file, wikihow_file):
    model = tiny_llama if which == "tiny" else demo.MODEL
    data = rows_file if kind == "rows" else wikihow_file
    expected, results = harness(model, data, hellaswag=kind == "wikihow")

    questions = cecompile.read_questions(data)
    scorer = cecompile.Scorer.from_pretrained(model, device="cpu", dtype="float32", tokens_per_bucket=512)
    got = cecompile.evaluate(scorer, questions)

    assert len(got.samples) == len(expected)
    for sample, (loglikelihoods, greedy, acc, acc_norm) in zip(got.samples, expected, strict=True):
        np.testing.assert_allclose(sample.loglikelihoods, loglikelihoods, rtol=0, atol=TOLERANCE)
        assert tuple(sample.greedy) == greedy
        assert (sample.prediction == sample.label) == (acc == 1.0)
        assert (sample.prediction_norm == sample.label) == (acc_norm == 1.0)
    for name in ("acc", "acc_norm"):
        assert got.results["metrics"][name] == pytest.approx(results[f"{name},none"])
    if which == "tiny" and kind == "rows":
        assert got.results["truncated_questions"] == 2


@pytest.fixture(scope="session")
def reference(llama_tokenizer_dir):
    questions = cecompile.read_questions(shared_file("hellaswag_val.jsonl"), limit=150)
    scorer = cecompile.Scorer.from_pretrained(llama_tokenizer_dir, device="cpu", engine="reference")
    return questions, scorer.score(questions)


@pytest.mark.compiles
@pytest.mark.parametrize("engine", ["compiled", "eager"])
@pytest.mark.parametrize("attention", ["flex", "sdpa"])
def test_equals_reference_on_hellaswag(engine, attention, llama_tokenizer_dir, reference):
    questions, expected = reference
    how = {"device": "cpu", "engine": engine, "attention": attention, "tokens_per_bucket": 1024}  # one shape to compile
    scorer = cecompile.Scorer.from_pretrained(llama_tokenizer_dir, **how)
    got = scorer.score(questions)
    assert scorer.runtime.mode.attention == attention
    assert got.greedy == expected.greedy
    for q, a, b in zip(questions, got.loglikelihoods, expected.loglikelihoods, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)
        lengths = [len(c) for c in q.choices]
        assert np.argmax(a) == np.argmax(b)
        assert np.argmax(np.divide(a, lengths)) == np.argmax(np.divide(b, lengths))
