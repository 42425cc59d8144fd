"""Rows become the text that lm-evaluation-harness would make of them, and answers are judged as it would."""

import json
import math
import tempfile

import pytest
from support.rows import write_table

from cecompile import read_questions
from cecompile.errors import UserError
from cecompile.tasks.judge import judge, metrics
from cecompile.tasks.question import Question, digest
from cecompile.tasks.read import _hub_rows, read_dataset


def read(tmp_path, *rows, name="rows.jsonl", **options):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return read_questions(path, **options)


def test_hellaswag_text(tmp_path):
    row = {"ind": 7, "activity_label": " Health", "ctx_a": "[header] How to rest [title] Sit  down."}
    row |= {"ctx_b": "tHEN you", "endings": [" [step] lie down. ", "stand  up [title] fast"], "label": "1"}
    (question,) = read(tmp_path, row)
    assert question == Question("7", "Health: How to rest. Sit down. Then you", (" lie down.", "stand up. fast"), 1)


def test_the_same_text_as_lm_eval(tmp_path):
    from lm_eval.tasks.hellaswag.utils import preprocess

    texts = ["  a [title] b  ", "[header] x  y   z", "no marks", "[a [nested] b] c", "a [title][step] b", "["]
    for text in texts:
        row = {"activity_label": text, "ctx_a": text, "ctx_b": text, "endings": [text + "e", "x"], "label": 0}
        (question,) = read(tmp_path, row)
        assert question.context == preprocess(text + ": " + text + " " + text.capitalize())
        assert question.choices[0] == preprocess(text + "e")


def test_arc_openbookqa_and_piqa_text(tmp_path):
    choices = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    (arc,) = read(tmp_path, {"id": "Mercury_1", "question": "Why?", "choices": choices, "answerKey": "2"})
    assert arc == Question("Mercury_1", "Question: Why?\nAnswer:", ("a", "b", "c"), 1)
    (obqa,) = read(tmp_path, {"question_stem": "The sun is", "choices": choices, "answerKey": " 3"})
    assert obqa == Question("0", "The sun is", ("a", "b", "c"), 2)
    (piqa,) = read(tmp_path, {"goal": "Open it", "sol1": "x", "sol2": "y", "label": 1})
    assert piqa == Question("0", "Question: Open it\nAnswer:", ("x", "y"), 1)
    (unlabelled,) = read(tmp_path, {"goal": "Open it", "sol1": "x", "sol2": "y", "label": -1})
    assert unlabelled.label is None


def test_labels_may_be_missing(tmp_path):
    row = {"query": "q", "choices": ["a", "b"]}
    assert [q.label for q in read(tmp_path, row, row | {"gold": None}, row | {"gold": ""})] == [None] * 3


def test_limit_is_a_count_or_a_fraction(tmp_path):
    rows = [{"query": str(i), "choices": ["a", "b"], "gold": 0} for i in range(10)]
    assert [q.id for q in read(tmp_path, *rows, limit=3)] == ["0", "1", "2"]
    assert len(read(tmp_path, *rows, limit=0.25)) == 3
    assert len(read(tmp_path, *rows, limit=99)) == 10


def test_limit_reads_no_further(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": 0}) + "\nnot JSON\n")
    assert len(read_questions(path, limit=1)) == 1


def test_every_file_type_gives_the_same_questions(tmp_path):
    rows = [{"query": f"q{i}", "choices": ["a", "b,c"], "gold": i % 2} for i in range(5)]
    expected = read(tmp_path, *rows)
    array = tmp_path / "rows.json"
    array.write_text("\n  " + json.dumps(rows, indent=1))
    for path in (array, *(write_table(tmp_path / f"rows.{kind}", rows) for kind in ("parquet", "csv"))):
        assert read_questions(path) == expected
        assert digest(read_questions(path)) == digest(expected)


@pytest.mark.parametrize(
    ("cell", "choices"),
    [
        ('["4", "5"]', ("4", "5")),
        ("[4, 5.50, -1e3]", ("4", "5.50", "-1e3")),
        ("['4', 5.50, -1e3]", ("4", "5.50", "-1e3")),
        ("[true, NaN, null]", ("true", "NaN", "null")),
        ("[True, None, 0x10]", ("True", "None", "0x10")),
        ("('a', 'it\\'s')", ("a", "it's")),
    ],
)
def test_lists_in_cells_are_the_texts_as_written(cell, choices, tmp_path):
    path = write_table(tmp_path / "rows.csv", [{"query": "2+2?", "choices": cell, "gold": "0"}])
    assert read_questions(path) == [Question("0", "2+2?", choices, 0)]


def test_cells_of_numbers_are_texts(tmp_path):
    (tmp_path / "rows.csv").write_text("goal,sol1,sol2,label,id\nWhat is 2+2?,4,05,0,007\n1.50,true,null,1,8\n")
    assert read_questions(tmp_path / "rows.csv") == [
        Question("007", "Question: What is 2+2?\nAnswer:", ("4", "05"), 0),
        Question("8", "Question: 1.50\nAnswer:", ("true", "null"), 1),
    ]


def test_every_nested_field_is_read_from_a_cell(tmp_path):
    messages = [{"role": "user", "content": "choices: [1, 2]"}]
    options = {"text": ["a", "b"], "label": ["A", "B"]}
    wiki = {"activity_label": "l", "ctx_a": "a", "ctx_b": "b", "endings": ["x", "y"], "label": 0}
    for row in (
        {"message": messages, "answer": "1"},
        {"messages": messages, "answer": "1"},
        {"question": "q", "choices": options, "answerKey": "B"},
        {"question_stem": "q", "choices": options, "answerKey": "B"},
        wiki,
    ):
        expected = read(tmp_path, row)
        for write in (json.dumps, repr):
            cells = {name: value if isinstance(value, str) else write(value) for name, value in row.items()}
            assert read_questions(write_table(tmp_path / "rows.csv", [cells])) == expected


NUMPY = {
    "query,choices,gold\nq,['a' 'b' 'c'],0\n": "'choices'",
    "query,choices,gold\nq,\"['a' 'b'\n 'c']\",0\n": "'choices'",
    "activity_label,ctx_a,ctx_b,endings,label\nl,a,b,['x' 'y'],0\n": "'endings'",
    "query,choices,gold\nq,\"array(['a', 'b'], dtype=object)\",0\n": "'choices'",
    "question,choices,answerKey\nq,\"{'text': array(['a'], dtype=object), 'label': array(['A'])}\",A\n": "'choices'",
    "message\n[{'role': 'user' 'content'}]\n": "'message'",
}


@pytest.mark.parametrize("text", NUMPY)
def test_lists_as_numpy_prints_them_are_refused(text, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=rf"row 1: field {NUMPY[text]}: written as NumPy prints it; save the rows as"):
        read_questions(tmp_path / "rows.csv")


def test_messages_and_content_in_parts(tmp_path):
    parts = [{"type": "text", "text": "which?\n"}, {"type": "text", "text": "choices: ['c', 'd']"}]
    for name in ("message", "messages"):
        (question,) = read(tmp_path, {name: [{"role": "user", "content": parts}], "answer": "c"})
        assert question.messages == (("user", "which?\nchoices: ['c', 'd']"),)
    both = {name: [{"role": "user", "content": name}] for name in ("messages", "message")}
    assert read(tmp_path, both)[0].messages == (("user", "message"),)  # as before there was another name
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    for content in (image, [], [parts], [{"type": "text"}]):
        with pytest.raises(UserError, match=r"field 'messages\[0\]\.content"):
            read(tmp_path, {"messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize("content", [{"query": "q", "choices": ["a", "b"]}, [{"query": "q", "choices": ["a", "b"]}]])
def test_byte_order_mark_is_skipped(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert len(read_questions(path)) == 1


def test_csv_keeps_empty_texts_and_texts_that_look_missing(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('activity_label,ctx_a,ctx_b,endings,label\nl,a,,"[""None"", ""NA""]",1\n')
    assert read_questions(path) == [Question("0", "l: a", ("None", "NA"), 1)]


def test_task_option_settles_what_is_ambiguous(tmp_path):
    row = {"query": "q", "choices": ["a", "b"], "gold": 0}
    row |= {"activity_label": "l", "ctx_a": "a", "ctx_b": "b", "endings": ["x", "y"], "label": 0}
    path = write_table(tmp_path / "rows.jsonl", [row])
    assert read_dataset(path, "hellaswag").questions[0].choices == ("x", "y")
    assert read_dataset(path, "choices").questions[0].choices == ("a", "b")


def test_without_a_place_for_a_cache_tables_are_read(tmp_path, monkeypatch):
    """As without a home directory; what is made in its stead is removed."""
    from datasets import config

    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    (tmp_path / "rows.csv").write_text("query,choices,gold\nq,\"['a', 'b']\",1\n")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    [question] = read_questions(tmp_path / "rows.csv")
    assert (question.context, question.choices, question.label) == ("q", ("a", "b"), 1)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("writable", [True, False])
def test_hub_data_set(writable, tmp_path, monkeypatch):
    """A hub id goes to `datasets`, which also loads directories of that shape; its cache need not be writable."""
    from datasets import config

    (tmp_path / "file").write_text("")
    place = tmp_path / "cache" if writable else tmp_path / "file" / "cache"
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME"):
        monkeypatch.setattr(config, name, place)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    row = {"query": "q", "choices": ["a", "b"], "gold": 1}
    write_table(tmp_path / "owner" / "name" / "validation.parquet", [row])
    monkeypatch.chdir(tmp_path)
    assert list(_hub_rows("owner/name", "owner/name", None, None)) == [("owner/name: row 1", row)]


def test_first_of_equals_wins_and_norm_divides_by_characters():
    question = Question("0", "c", ("aa", "bbbb", "cc"), 1)
    sample = judge(question, [-2.0, -3.0, -2.0], [False, True, False])
    assert (sample.prediction, sample.prediction_norm) == (0, 1)


def test_metrics_and_their_errors():
    question = Question("0", "c", ("a", "b"), 0)
    samples = [judge(question, values, [False, False]) for values in ([0, -1], [0, -1], [0, -1], [-1, 0])]
    out = metrics(samples)
    assert out["acc"] == 0.75
    assert out["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 * 4 / 3) / 2)
    assert metrics(samples[:1])["acc_stderr"] is None
    unlabelled = judge(Question("0", "c", ("a", "b"), None), [0, -1], [False, False])
    assert metrics([unlabelled]) == dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))
