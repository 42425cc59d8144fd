"""Row formats: how a row of a dataset becomes a question.

Wording, delimiters and preprocessing follow the tasks `hellaswag`, `arc_easy`, `openbookqa` and `piqa` of
lm-evaluation-harness 0.4.13, so that scores can be compared with published scores.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cecompile.errors import UserError
from cecompile.tasks.chat import ChatQuestion
from cecompile.tasks.nested import read_nested
from cecompile.tasks.question import Question

Row = Mapping[str, Any]
_NOTHING = object()  # the value of a field that is missing


@dataclass(frozen=True, slots=True)
class Format:
    """A known row format: the fields that identify the format, the field of the label, and the conversion."""

    name: str
    task: str
    fields: frozenset[str]
    label_field: str
    convert: Callable[[Row, str, str], Question | ChatQuestion]  # (row, where, id)


def preprocess(text: str) -> str:
    """HellaSwag's clean-up of WikiHow marks, character for character as in lm-evaluation-harness."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(row: Row, where: str, id: str) -> Question:
    before, after = _text(row["ctx_a"], "ctx_a", where), _text(row["ctx_b"], "ctx_b", where)
    activity = _text(row["activity_label"], "activity_label", where)
    context = preprocess(f"{activity}: {before} {after.capitalize()}")
    endings = _choices([preprocess(e) for e in _texts(row["endings"], "endings", where)], "endings", where)
    return Question(id, context, endings, _index(row.get("label"), "label", len(endings), where))


def _query(row: Row, where: str, id: str) -> Question:
    choices = _choices(_texts(row["choices"], "choices", where), "choices", where)
    label = _index(row.get("gold"), "gold", len(choices), where)
    return Question(id, _text(row["query"], "query", where), choices, label)


def _arc(row: Row, where: str, id: str) -> Question:
    choices, label = _lettered(row, where)
    return Question(id, f"Question: {_text(row['question'], 'question', where)}\nAnswer:", choices, label)


def _openbookqa(row: Row, where: str, id: str) -> Question:
    choices, label = _lettered(row, where)
    return Question(id, _text(row["question_stem"], "question_stem", where), choices, label)


def _piqa(row: Row, where: str, id: str) -> Question:
    choices = _choices([_text(row[field], field, where) for field in ("sol1", "sol2")], "sol1/sol2", where)
    label = None if row.get("label") in (-1, "-1") else row.get("label")  # -1 throughout the published test split
    context = f"Question: {_text(row['goal'], 'goal', where)}\nAnswer:"
    return Question(id, context, choices, _index(label, "label", 2, where))


def _chat(row: Row, where: str, id: str) -> ChatQuestion:
    field = "message" if "message" in row else "messages"
    listed = read_nested(row[field], field, where)
    _check(isinstance(listed, list) and listed, listed, "a list of messages", field, where)
    messages = []
    for i, message in enumerate(listed):
        _check(isinstance(message, Mapping), message, "an object", f"{field}[{i}]", where)
        role = _text(message.get("role", _NOTHING), f"{field}[{i}].role", where)
        messages.append((role, _content(message.get("content", _NOTHING), f"{field}[{i}].content", where)))
    answer = None if row.get("answer") is None else _text(row["answer"], "answer", where)
    return ChatQuestion(id, tuple(messages), answer)


def _content(value: Any, field: str, where: str) -> str:
    """A message's text, which may be given as a list of parts of the type "text"."""
    parts = value if isinstance(value, list) else []
    if not parts or not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        return _text(value, field, where)
    return "".join(_text(part.get("text", _NOTHING), f"{field}[{i}].text", where) for i, part in enumerate(parts))


FORMATS = (
    Format("hellaswag", "hellaswag", frozenset({"activity_label", "ctx_a", "ctx_b", "endings"}), "label", _hellaswag),
    Format("query/choices/gold", "choices", frozenset({"query", "choices"}), "gold", _query),
    Format("arc", "choices", frozenset({"question", "choices"}), "answerKey", _arc),
    Format("openbookqa", "choices", frozenset({"question_stem", "choices"}), "answerKey", _openbookqa),
    Format("piqa", "choices", frozenset({"goal", "sol1", "sol2"}), "label", _piqa),
    Format("chat", "chat", frozenset({"message"}), "answer", _chat),
    Format("chat of messages", "chat", frozenset({"messages"}), "answer", _chat),
)
TASKS = ("hellaswag", "choices", "chat")


def detect(row: Row, task: str, where: str) -> Format:
    """The one format of a task (of any with "auto") whose fields `row` has. Raises UserError: none fits, or several."""
    known = [f for f in FORMATS if task in ("auto", f.task)]
    matches = [f for f in known if f.fields <= row.keys()]
    seen = ", ".join(sorted(map(str, row))) or "none"
    if len({f.convert for f in matches}) > 1:  # names of one format's fields may stand beside each other
        names = " and ".join(f.name for f in matches)
        raise UserError(f"{where}: fields {seen}: fit {names} alike; name one with --task or drop the others' fields")
    if not matches:
        expected = "; ".join(f"{f.name}: {', '.join(sorted(f.fields))}" for f in known)
        raise UserError(f"{where}: fields {seen}: no known format ({expected})")
    return matches[0]


def to_question(row: Row, fmt: Format, where: str, position: int) -> Question | ChatQuestion:
    """Converts a row to a question. `position` (from 0) is the id of a row without one.

    Raises UserError: a field is missing, of the wrong type, empty or out of range.
    """
    missing = sorted(fmt.fields - row.keys())
    if missing:
        raise UserError(f"{where}: field '{missing[0]}': missing ({fmt.name} rows have it)")
    id = row.get("id", row.get("ind", position))
    _check(isinstance(id, (int, str)) and not isinstance(id, bool), id, "a text or a number", "id", where)
    return fmt.convert(row, where, _text(str(id), "id", where))


def _check(fits: object, value: Any, expected: str, field: str, where: str) -> None:
    """Raises UserError about `value` unless it `fits`."""
    if fits:
        return
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "an object", object: "nothing"}
    found = "an empty list" if value == [] else names.get(type(value), type(value).__name__)
    shown = f" ({value!r:.40})" if isinstance(value, (bool, int, float, str)) else ""
    raise UserError(f"{where}: field '{field}': expected {expected}, found {found}{shown}")


def _text(value: Any, field: str, where: str) -> str:
    _check(isinstance(value, str), value, "a text", field, where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: field '{field}': not valid Unicode (a lone surrogate)") from None
    return str(value)


def _texts(value: Any, field: str, where: str) -> list[str]:
    value = read_nested(value, field, where)
    _check(isinstance(value, list), value, "a list of texts", field, where)
    return [_text(item, f"{field}[{i}]", where) for i, item in enumerate(value)]


def _choices(texts: list[str], field: str, where: str) -> tuple[str, ...]:
    if len(texts) < 2:
        raise UserError(f"{where}: field '{field}': {len(texts)} choices, at least 2 are needed")
    for i, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"{where}: field '{field}[{i}]': empty choice")
    return tuple(texts)


def _index(value: Any, field: str, count: int, where: str) -> int | None:
    if value in (None, ""):
        return None
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}\s*", value):
        value = int(value)
    fits = isinstance(value, int) and not isinstance(value, bool)
    _check(fits, value, "the index of a choice", field, where)
    if not 0 <= value < count:
        raise UserError(f"{where}: field '{field}': {value} is out of range, there are {count} choices")
    return value


def _lettered(row: Row, where: str) -> tuple[tuple[str, ...], int | None]:
    """Choices of the form {"text": [...], "label": [...]}, and the index that `answerKey` names."""
    choices = read_nested(row["choices"], "choices", where)
    _check(isinstance(choices, Mapping), choices, "an object with text and label", "choices", where)
    for part in ("text", "label"):
        if part not in choices:
            raise UserError(f"{where}: field 'choices.{part}': missing")
    texts = _choices(_texts(choices["text"], "choices.text", where), "choices.text", where)
    labels = _texts(choices["label"], "choices.label", where)
    if len(labels) != len(texts):
        raise UserError(f"{where}: field 'choices.label': {len(labels)} labels for {len(texts)} choices")
    key = row.get("answerKey")
    if key in (None, ""):
        return texts, None
    _check(isinstance(key, str), key, "a text", "answerKey", where)
    if key.strip() not in labels:
        raise UserError(f"{where}: field 'answerKey': {key!r} is not among the labels {', '.join(labels)}")
    return texts, labels.index(key.strip())
