"""Each row format against the task of its name in lm-evaluation-harness: requests, loglikelihoods and metrics."""

import math
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from support.rows import write_rows, write_table

from cecompile import Question, Scorer, evaluate, read_questions
from cecompile.errors import UserError
from cecompile.results.check import problems
from cecompile.results.compare import compare_directories
from cecompile.results.read import read_result
from cecompile.tasks.formats import FORMATS, detect, to_question
from cecompile.tasks.judge import Sample, metrics
from cecompile.tasks.read import _hub_rows, read_dataset

TASKS = Path(lm_eval.__file__).parent / "tasks"
ODD = [
    "the sun is out.", " a leading space", "Two  spaces, and a comma.", "Ünïcode – “quotes”", "a [bracket], {braces}",
    "100 % of 3.5", "It's late", "A trailing space ", "What? Why!", "l'eau\tet le vin", "x", "日本 and Korea",
]  # fmt: skip


def odd(i: int) -> str:
    return ODD[i % len(ODD)]


def options(i: int, count: int) -> list[str]:
    return [odd(i + k + 1) for k in range(count)]


def lettered(i: int, count: int) -> dict:
    return {"text": options(i, count), "label": list("ABCDE")[:count]}


def problem(i: int) -> dict:
    question = odd(i) + ("  _  ." if i % 2 else "")
    return {"question": question, "answer": "ABCD"[i % 4], "options": options(i, 4)}


ROWS = {  # by format: the task's file, and rows in the form of the hub's dataset
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        lambda i: {
            "ind": i, "activity_label": odd(i), "ctx_a": odd(i + 1), "ctx_b": ("", odd(i + 2))[i % 2],
            "ctx": f"{odd(i + 1)} {odd(i + 2)}", "endings": [f"{o} [step] end" for o in options(i, 4)],
            "label": str(i % 4),
        },
    ),
    "arc": (
        "arc/arc_easy.yaml",
        lambda i: {"id": f"M_{i}", "question": odd(i), "choices": lettered(i, 3 + i % 3), "answerKey": "ABC"[i % 3]},
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        lambda i: {"id": str(i), "question_stem": odd(i), "choices": lettered(i, 4), "answerKey": "ABCD"[i % 4]},
    ),
    "piqa": ("piqa/piqa.yaml", lambda i: {"goal": odd(i), "sol1": odd(i + 1), "sol2": odd(i + 2), "label": i % 2}),
    "mmlu": (
        "mmlu/default/mmlu_high_school_biology.yaml",
        lambda i: {"question": odd(i), "subject": "high_school_biology", "choices": options(i, 4), "answer": i % 4},
    ),
    "commonsense_qa": (
        "commonsense_qa/default.yaml",
        lambda i: {
            "id": str(i), "question": odd(i), "question_concept": "sun", "choices": lettered(i, 5),
            "answerKey": "ABCDE"[i % 5],
        },
    ),
    "winogrande": (
        "winogrande/default.yaml",
        lambda i: {
            "sentence": f"{odd(i)} so _ {odd(i + 1)}" if i % 3 else f"_ was there; {odd(i)}.", "option1": "Ann",
            "option2": odd(i + 2), "answer": str(1 + i % 2),
        },
    ),
    "boolq": (
        "super_glue/boolq/default.yaml",
        lambda i: {"passage": odd(i), "question": odd(i + 1), "idx": i, "label": i % 2},
    ),
    "social_iqa": (
        "siqa/siqa.yaml",
        lambda i: {
            "context": odd(i), "question": odd(i + 1), "answerA": odd(i + 2), "answerB": odd(i + 3),
            "answerC": odd(i + 4), "label": str(1 + i % 3),
        },
    ),
    "copa": (
        "super_glue/copa/default.yaml",
        lambda i: {
            "premise": odd(i), "choice1": odd(i + 1), "choice2": odd(i + 2), "idx": i, "label": i % 2,
            "question": ("cause", "effect")[i % 2],
        },
    ),
    "sciq": (
        "sciq/sciq.yaml",
        lambda i: {
            "question": odd(i), "distractor1": odd(i + 1), "distractor2": odd(i + 2), "distractor3": odd(i + 3),
            "correct_answer": odd(i + 4), "support": ("", odd(i + 5))[i % 2],
        },
    ),
    "race": (
        "race/race.yaml",
        lambda i: {"article": odd(i), "problems": repr([problem(i + k) for k in range(1 + i % 3)])},
    ),
    "truthfulqa_mc1": (
        "truthfulqa/truthfulqa_mc1.yaml",
        lambda i: {
            "question": odd(i), "mc1_targets": {"choices": options(i, 3 + i % 3), "labels": [1] + [0] * (2 + i % 3)},
            "mc2_targets": {"choices": options(i, 3 + i % 4), "labels": [1] * (1 + i % 2) + [0] * (2 + i % 4 - i % 2)},
        },
    ),
    "lambada": (
        "lambada/lambada_openai.yaml",
        lambda i: {"text": ("lone", f"{odd(i)}  {odd(i + 1)} end.", odd(i).strip() + " Ann's")[i % 3]},
    ),
}  # fmt: skip
ROWS["truthfulqa_mc2"] = ("truthfulqa/truthfulqa_mc2.yaml", ROWS["truthfulqa_mc1"][1])
NO_OTHERS = TaskManager(include_defaults=False)  # reading the harness's tasks, all of them, takes long
ASKED = {"truthfulqa_mc2", "lambada"}  # not taken by "auto"


def how_to_read(name: str) -> str:
    return name if name in ASKED else "auto"


def rows_of(name: str) -> list[dict]:
    return [ROWS[name][1](i) for i in range(14)]


def task_of(name: str, data: Path) -> ConfigurableTask:
    """The harness's own task, over a local file."""
    config = load_yaml(TASKS / ROWS[name][0], resolve_func=True)
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
    }
    for split in ("training_split", "test_split", "fewshot_split"):
        config.pop(split, None)
    config |= {"validation_split": "validation", "num_fewshot": 0, "task": name}
    for unknown in ("task_alias", "tag", "include", "group"):
        config.pop(unknown, None)
    return ConfigurableTask(config=config)


def pairs(question: Question) -> list[tuple[str, str]]:
    contexts = question.contexts or (question.context,) * len(question.choices)
    return [(c, question.delimiter + choice) for c, choice in zip(contexts, question.choices, strict=True)]


@pytest.mark.parametrize("name", ROWS)
def test_scores_as_the_harnesss_task_of_that_name(name, tiny_llama, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(name))
    task, questions = task_of(name, data), read_questions(data, task=how_to_read(name))
    model = HFLM(pretrained=str(tiny_llama), dtype="float32", device="cpu", batch_size=4)
    out = lm_eval.simple_evaluate(
        model=model, tasks=[task], log_samples=True, bootstrap_iters=0, task_manager=NO_OTHERS
    )
    theirs = sorted(out["samples"][name], key=lambda sample: sample["doc_id"])
    asked = sorted(task.instances, key=lambda one: (one.doc_id, one.idx))
    assert [pair for question in questions for pair in pairs(question)] == [one.args for one in asked]
    ours = evaluate(Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager"), questions)
    for sample, other in zip(ours.samples, theirs, strict=True):
        expected = [float(answer[0][0]) for answer in other["resps"]]
        np.testing.assert_allclose(sample.loglikelihoods, expected, rtol=0, atol=1e-3)
    metrics = {key.removesuffix(",none"): value for key, value in out["results"][name].items() if key.endswith(",none")}
    metrics = {key: value for key, value in metrics.items() if not key.endswith("_stderr")}
    assert "acc" in metrics
    assert ("perplexity" in metrics) == (name == "lambada")
    for metric, value in metrics.items():
        assert ours.results["metrics"][metric] == pytest.approx(value), metric


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_give_the_same_questions(name, kind, tmp_path):
    rows = rows_of(name)
    expected = read_questions(write_rows(tmp_path / "rows.jsonl", rows), task=how_to_read(name))
    assert read_questions(write_table(tmp_path / f"rows.{kind}", rows), task=how_to_read(name)) == expected
    assert read_questions(tmp_path / "rows.jsonl", task=name) == expected


LABELS = {  # by format: forms of the label of the second choice, and forms of no label
    "piqa": (["1", 1, 1.0, "1.0", " 1"], [-1, "-1", None, ""]),
    "mmlu": (["1", 1, 1.0, "B"], [None, ""]),
    "winogrande": (["2", 2, 2.0], ["", None]),
    "boolq": (["1", 1, True, "True"], [-1, None]),
    "social_iqa": (["2", 2, "2.0"], ["", None]),
    "copa": (["1", 1, "choice2"], [-1, None]),
    "race of one problem": (["B", "1", 1], ["", None]),
}
SINGLE = {"article": "a", "question": "Why?", "options": ["x", "y"], "answer": "A"}  # a row of RACE's most copies


@pytest.mark.parametrize("name", LABELS)
def test_labels_in_the_forms_in_which_they_occur(name, tmp_path):
    field = next(f for f in FORMATS if f.name == name).label[0]
    for forms, expected in zip(LABELS[name], (1, None), strict=True):
        for form in forms:
            row = SINGLE if name.startswith("race") else rows_of(name)[0]
            (question,) = read_questions(write_rows(tmp_path / "rows.jsonl", [row | {field: form}]))
            assert question.label == expected, form


def test_copies_of_a_dataset_name_the_label_otherwise(tmp_path):
    boolq = {"passage": "p", "question": "is it", "answer": False}
    winogrande = {"sentence": "a _ b", "option1": "x", "option2": "y", "label": "2"}
    for row, label in ((boolq, 0), (winogrande, 1)):
        assert read_questions(write_rows(tmp_path / "rows.jsonl", [row]))[0].label == label


def test_a_shared_continuation_after_contexts_that_differ(tmp_path):
    """llm-foundry's rows: one continuation, scored after each context."""
    row = {"context_options": ["Ann left, as Ann", "Ann left, as Bob"], "continuation": "was tired.", "gold": 1}
    (question,) = read_questions(write_rows(tmp_path / "rows.jsonl", [row]))
    assert pairs(question) == [(context, " was tired.") for context in row["context_options"]]
    assert question.label == 1


def test_both_forms_of_races_rows_are_the_same_question(tmp_path):
    listed = [{"question": "Why?", "options": ["x", "y"], "answer": "A"}]
    rows = ({"article": "a", "problems": listed}, {"article": "a", "problems": repr(listed)}, SINGLE)
    read = [read_questions(write_rows(tmp_path / "rows.jsonl", [row])) for row in rows]
    assert read == [[Question("0", "Article: a\n\nWhy?", ("x", "y"), 0)]] * 3


def test_auto_takes_one_right_answer_of_truthfulqa_and_says_so(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of("truthfulqa_mc1"))
    read = read_dataset(data)
    assert read.task == "truthfulqa_mc1"
    assert read.note == "rows read as truthfulqa_mc1; --task truthfulqa_mc2 reads them as truthfulqa_mc2"
    assert all(question.true == () for question in read.questions)
    several = read_dataset(data, task="truthfulqa_mc2")
    assert several.note is None
    assert [question.true for question in several.questions][:2] == [(0,), (0, 1)]


def test_rows_of_two_tasks_alike(tmp_path):
    """CommonsenseQA's rows without the concept have the fields of ARC's."""
    row = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    assert read_questions(data) == [Question("0", "Question: Why?\nAnswer:", ("a", "b"), 1)]
    assert "rows read as arc; --task commonsense_qa" in read_dataset(data).note
    assert read_dataset(data, task="arc").note is None
    lettered = Question("0", "Question: Why?\nA. a\nB. b\nAnswer:", ("A", "B"), 1)
    assert read_questions(data, task="commonsense_qa") == [lettered]


def truths(**labels: list[int]) -> dict:
    return {"question": "q"} | {
        f"{name}_targets": {"choices": ["a", "b"], "labels": labels.get(name, [1, 0])} for name in ("mc1", "mc2")
    }


REFUSED = [
    ({"goal": "g", "sol1": "a"}, "nearest: piqa rows also have sol2"),
    ({"question": "q", "choice1": "a", "choice2": "b"}, "nearest: copa rows also have premise"),
    (dict.fromkeys(("support", "question", "distractor1", "distractor2", "distractor3"), "x"), "sciq rows also have"),
    ({"texts": "x"}, "known are hellaswag, query/choices/gold, arc, "),
    ({"text": "x"}, "no known format (--task lambada reads them as lambada)"),
    ({"article": "a", "problems": []}, "field 'problems': expected a list of objects, found an empty list"),
    ({"article": "a", "problems": "one"}, "field 'problems': expected a list of objects, found a text ('one')"),
    (
        {"article": "a", "problems": [{"question": "q", "answer": "A"}]},
        "'problems[0].options': expected a list of texts",
    ),
    ({"article": "a", "problems": [SINGLE | {"answer": None}, SINGLE]}, "'problems[0].answer': expected the letter"),
    ({"article": "a", "problems": [SINGLE | {"answer": "C"}]}, "'problems[0].answer': expected the index of a choice"),
    (truths(mc1=[0, 0]), "field 'mc1_targets.labels': expected a label that is 1"),
    (truths(mc1=[1, 1]), "field 'mc1_targets.labels': expected one true answer"),
    (truths(mc1=[1]), "field 'mc1_targets.labels': expected a list of 2 labels, one for each choice"),
    (truths(mc1=[1, 2]), "field 'mc1_targets.labels[1]': 2 is out of range"),
    ({"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}, "'sentence': expected a blank"),
    ({"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "0"}, "field 'answer': 0 is out of range"),
    ({"question": "q", "choices": ["a", "b"], "answer": "E"}, "field 'answer': expected the index of a choice"),
    ({"question": "q", "choices": ["a", "b"], "answer": 2}, "field 'answer': 2 is out of range"),
    ({"question": "q", "choices": [str(i) for i in range(27)], "answer": 0}, "'choices': expected at most 26 choices"),
    ({"premise": "p.", "choice1": "a", "choice2": "b", "question": "when"}, "'question': expected cause or effect"),
    ({"continuation": " ", "context_options": ["a", "b"], "gold": 0}, "'continuation[0]': empty choice"),
    ({"continuation": "c", "context_options": ["a"], "gold": 0}, "'context_options': 1 choices"),
    ({"passage": "p", "question": "q", "label": 2}, "field 'label': 2 is out of range, there are 2 choices"),
    ({"passage": "p", "question": "q", "label": "maybe"}, "field 'label': expected the index of a choice"),
    ({"passage": 7, "question": "q", "label": 1}, "field 'passage': expected a text, found a number (7)"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_rows_that_are_no_questions_are_told_why(row, message, tmp_path):
    with pytest.raises(UserError) as refused:
        read_questions(write_rows(tmp_path / "rows.jsonl", [row]))
    assert message in str(refused.value)


def test_a_text_that_ends_in_no_word_is_refused(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "one two "}])
    with pytest.raises(UserError, match="line 1: field 'text': expected a text that ends in a word"):
        read_questions(data, task="lambada")


@pytest.mark.parametrize("name", sorted(ASKED))
def test_windows_and_files_keep_metrics_that_are_no_share_of_right_answers(name, tiny_llama, tmp_path):
    questions = read_questions(write_rows(tmp_path / "rows.jsonl", rows_of(name)), task=name)
    scorer = Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager")
    whole = evaluate(scorer, questions, output=tmp_path / "whole")
    parts = evaluate(scorer, questions, window=5, output=tmp_path / "parts")
    assert parts.results["metrics"] == pytest.approx(whole.results["metrics"], rel=1e-4)
    assert list(parts.samples) == read_result(tmp_path / "parts").samples
    assert [one.true for one in parts.samples] == [question.true for question in questions]
    assert problems(tmp_path / "whole") == problems(tmp_path / "parts") == []
    compared = compare_directories(tmp_path / "whole", tmp_path / "parts")
    assert compared["drop_points"] == {"acc": pytest.approx(0, abs=1e-3)}
    assert compared["failed"] == []


def test_perplexity_and_mass_of_given_loglikelihoods():
    """Perplexity is the exponential of the mean negative loglikelihood: here of 1 and 3, with deviation sqrt(2)."""
    ends = [Sample(str(i), 0, 0, 0, (-value,), (value < 2,)) for i, value in enumerate((1.0, 3.0))]
    assert metrics(ends) == pytest.approx(
        {"perplexity": math.exp(2), "perplexity_stderr": math.exp(2), "acc": 0.5, "acc_stderr": 0.5}
    )
    unlikely = [Sample("0", 0, 0, 0, (-math.inf,), (False,)), *ends]
    assert metrics(unlikely)["perplexity"] is None
    logs = tuple(math.log(p) for p in (0.1, 0.2, 0.1))
    several = [Sample("0", true[0], 1, 1, logs, (False,) * 3, true) for true in ((0, 1), (2,))]
    assert metrics(several)["acc"] == pytest.approx((0.75 + 0.25) / 2)
    far = tuple(value - 2000 for value in logs)  # their probabilities are no numbers
    assert metrics([Sample("0", 0, 1, 1, far, (False,) * 3, true=(0, 1))])["acc"] == pytest.approx(0.75)
    never = Sample("0", 0, 0, 0, (-math.inf,) * 2, (False,) * 2, true=(1,))
    assert metrics([never])["acc"] == 0


CLASSES = {"mmlu": ("answer", list("ABCD")), "boolq": ("label", ["False", "True"]), "piqa": ("label", ["0", "1"])}


@pytest.mark.parametrize("name", ROWS)
def test_datasets_of_the_hub_have_configurations_and_class_labels(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "owner" / name
    (place / "part").mkdir(parents=True)
    table = datasets.Dataset.from_list(rows_of(name))
    if name in CLASSES:
        field, names = CLASSES[name]
        table = table.cast_column(field, datasets.ClassLabel(names=names))
    table.to_parquet(place / "part" / "test.parquet")
    described = "configs:\n- config_name: part\n  data_files:\n  - {split: test, path: part/test.parquet}\n"
    (place / "README.md").write_text(f"---\n{described}---\n")
    found = list(_hub_rows(f"owner/{name}/part:test", f"owner/{name}", "part", "test"))
    fmt = detect(found[0][1], how_to_read(name), "")
    questions = [to_question(row, fmt, where, i) for i, (where, row) in enumerate(found)]
    assert questions == read_questions(write_rows(tmp_path / "rows.jsonl", rows_of(name)), task=how_to_read(name))
