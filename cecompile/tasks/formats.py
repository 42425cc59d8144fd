"""Row formats: how a row of a dataset becomes a question.

Wording, delimiters and preprocessing are those of lm-evaluation-harness 0.4.13's tasks `hellaswag`, `arc_easy`,
`openbookqa` and `piqa`, so that scores can be compared with published ones.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cecompile.errors import UserError
from cecompile.tasks.chat import ChatQuestion
from cecompile.tasks.question import Question

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """A known row format: the fields that identify it, the one that holds the label, and the conversion."""

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
    context = _text(row, "ctx_a", where) + " " + _text(row, "ctx_b", where).capitalize()
    context = preprocess(_text(row, "activity_label", where) + ": " + context)
    endings = _choices([preprocess(e) for e in _texts(row["endings"], "endings", where)], "endings", where)
    return Question(id, context, endings, _index(row.get("label"), "label", len(endings), where))


def _query(row: Row, where: str, id: str) -> Question:
    choices = _choices(_texts(row["choices"], "choices", where), "choices", where)
    return Question(id, _text(row, "query", where), choices, _index(row.get("gold"), "gold", len(choices), where))


def _arc(row: Row, where: str, id: str) -> Question:
    choices, label = _lettered(row, where)
    return Question(id, f"Question: {_text(row, 'question', where)}\nAnswer:", choices, label)


def _openbookqa(row: Row, where: str, id: str) -> Question:
    choices, label = _lettered(row, where)
    return Question(id, _text(row, "question_stem", where), choices, label)


def _piqa(row: Row, where: str, id: str) -> Question:
    choices = _choices([_text(row, "sol1", where), _text(row, "sol2", where)], "sol1/sol2", where)
    label = row.get("label")
    unlabelled = label in (-1, "-1")  # what the published test split carries
    return Question(
        id,
        f"Question: {_text(row, 'goal', where)}\nAnswer:",
        choices,
        None if unlabelled else _index(label, "label", 2, where),
    )


def _chat(row: Row, where: str, id: str) -> ChatQuestion:
    listed = row["message"]
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: field 'message': expected a list of messages, found {_kind(listed)}")
    messages = []
    for i, message in enumerate(listed):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: field 'message[{i}]': expected an object, found {_kind(message)}")
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                found = _kind(message[part]) if part in message else "nothing"
                raise UserError(f"{where}: field 'message[{i}].{part}': expected a text, found {found}")
        role, content = (_clean(message[part], f"message[{i}].{part}", where) for part in ("role", "content"))
        messages.append((role, content))
    answer = None if row.get("answer") is None else _text(row, "answer", where)
    return ChatQuestion(id, tuple(messages), answer)


FORMATS = (
    Format("hellaswag", "hellaswag", frozenset({"activity_label", "ctx_a", "ctx_b", "endings"}), "label", _hellaswag),
    Format("query/choices/gold", "choices", frozenset({"query", "choices"}), "gold", _query),
    Format("arc", "choices", frozenset({"question", "choices"}), "answerKey", _arc),
    Format("openbookqa", "choices", frozenset({"question_stem", "choices"}), "answerKey", _openbookqa),
    Format("piqa", "choices", frozenset({"goal", "sol1", "sol2"}), "label", _piqa),
    Format("chat", "chat", frozenset({"message"}), "answer", _chat),
)
TASKS = ("hellaswag", "choices", "chat")


def detect(row: Row, task: str, where: str) -> Format:
    """The one format whose fields `row` has.

    Args:
        row: the dataset's first row.
        task: "auto", or a task that narrows the formats down.
        where: the row's place, for the message.

    Raises:
        UserError: no format fits, or several do.
    """
    known = [f for f in FORMATS if task in ("auto", f.task)]
    matches = [f for f in known if f.fields <= row.keys()]
    seen = ", ".join(sorted(map(str, row))) or "none"
    if len(matches) > 1:
        names = " and ".join(f.name for f in matches)
        raise UserError(f"{where}: fields {seen}: fit {names} alike; name one with --task or drop the others' fields")
    if not matches:
        expected = "; ".join(f"{f.name}: {', '.join(sorted(f.fields))}" for f in known)
        raise UserError(f"{where}: fields {seen}: no known format ({expected})")
    return matches[0]


def to_question(row: Row, fmt: Format, where: str, position: int) -> Question | ChatQuestion:
    """`row` as a question; `position` (from 0) is its id where it has none of its own.

    Raises:
        UserError: a field is missing, of the wrong type, empty or out of range.
    """
    missing = sorted(fmt.fields - row.keys())
    if missing:
        raise UserError(f"{where}: field '{missing[0]}': missing ({fmt.name} rows have it)")
    id = row.get("id", row.get("ind", position))
    if isinstance(id, bool) or not isinstance(id, (int, str)):
        raise UserError(f"{where}: field 'id': expected a text or a number, found {_kind(id)}")
    return fmt.convert(row, where, _clean(str(id), "id", where))


def _text(row: Row, field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{field}': expected a text, found {_kind(value)}")
    return _clean(value, field, where)


def _clean(text: str, field: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: field '{field}': not valid Unicode (a lone surrogate)") from None
    return text


def _texts(value: Any, field: str, where: str) -> list[str]:
    if isinstance(value, str):  # CSV keeps lists as text
        value = _parse_list(value)
    if not isinstance(value, list):
        raise UserError(f"{where}: field '{field}': expected a list of texts, found {_kind(value)}")
    for i, item in enumerate(value):
        if not isinstance(item, str):
            raise UserError(f"{where}: field '{field}[{i}]': expected a text, found {_kind(item)}")
        _clean(item, f"{field}[{i}]", where)
    return value


def _parse_list(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _choices(texts: list[str], field: str, where: str) -> tuple[str, ...]:
    if len(texts) < 2:
        raise UserError(f"{where}: field '{field}': {len(texts)} choices, at least 2 are needed")
    for i, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"{where}: field '{field}[{i}]': empty choice")
    return tuple(texts)


def _index(value: Any, field: str, count: int, where: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: field '{field}': expected the index of a choice, found {_kind(value)}")
    if not 0 <= value < count:
        raise UserError(f"{where}: field '{field}': {value} is out of range, there are {count} choices")
    return value


def _lettered(row: Row, where: str) -> tuple[tuple[str, ...], int | None]:
    """Choices of the form {"text": [...], "label": [...]}, and the index that `answerKey` names."""
    choices = row["choices"]
    if isinstance(choices, str):
        choices = _parse_list(choices)
    if not isinstance(choices, Mapping):
        raise UserError(f"{where}: field 'choices': expected an object with text and label, found {_kind(choices)}")
    for part in ("text", "label"):
        if part not in choices:
            raise UserError(f"{where}: field 'choices.{part}': missing")
    texts = _choices(_texts(choices["text"], "choices.text", where), "choices.text", where)
    labels = _texts(choices["label"], "choices.label", where)
    if len(labels) != len(texts):
        raise UserError(f"{where}: field 'choices.label': {len(labels)} labels for {len(texts)} choices")
    key = row.get("answerKey")
    if key is None or key == "":
        return texts, None
    if not isinstance(key, str):
        raise UserError(f"{where}: field 'answerKey': expected a text, found {_kind(key)}")
    if key.strip() not in labels:
        raise UserError(f"{where}: field 'answerKey': {key!r} is not among the labels {', '.join(labels)}")
    return texts, labels.index(key.strip())


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "an object"}
    name = "an empty list" if value == [] else names.get(type(value), type(value).__name__)
    return f"{name} ({value!r:.40})" if isinstance(value, (bool, int, float, str)) else name
