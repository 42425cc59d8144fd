"""Values of a row's fields: checked, and converted to texts, choices and labels. Each error names place and field."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cecompile.errors import UserError
from cecompile.tasks.nested import read_nested

NOTHING = object()  # the value of a field that is missing
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def check(fits: object, value: Any, expected: str, field: str, where: str) -> None:
    """Raises UserError about `value` unless it `fits`."""
    if fits:
        return
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    names |= {list: "a list", dict: "an object", object: "nothing"}
    found = "an empty list" if value == [] else names.get(type(value), type(value).__name__)
    shown = f" ({value!r:.40})" if isinstance(value, (bool, int, float, str)) else ""
    raise UserError(f"{where}: field '{field}': expected {expected}, found {found}{shown}")


def read_text(value: Any, field: str, where: str) -> str:
    """A text as it is. Raises UserError: no text, or a text that no encoding can write."""
    check(isinstance(value, str), value, "a text", field, where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: field '{field}': not valid Unicode (a lone surrogate)") from None
    return str(value)


def read_texts(value: Any, field: str, where: str) -> list[str]:
    """A list of texts, which a cell may hold as text. Raises UserError: see `read_text`."""
    value = read_nested(value, field, where)
    check(isinstance(value, list), value, "a list of texts", field, where)
    return [read_text(item, f"{field}[{i}]", where) for i, item in enumerate(value)]


def read_object(value: Any, field: str, where: str) -> Mapping[str, Any]:
    """An object, which a cell may hold as text. Raises UserError: no object."""
    value = read_nested(value, field, where)
    check(isinstance(value, Mapping), value, "an object", field, where)
    return dict(value)


def read_objects(value: Any, field: str, where: str) -> list[Mapping[str, Any]]:
    """A list of objects, at least one, which a cell may hold as text. Raises UserError: no such list."""
    value = read_nested(value, field, where)
    check(isinstance(value, list) and value, value, "a list of objects", field, where)
    return [read_object(item, f"{field}[{i}]", where) for i, item in enumerate(value)]


def read_true(value: Any, field: str, count: int, where: str) -> tuple[int, ...]:
    """The indices of the choices marked 1 in a list of 0 and 1. Raises UserError: no such list, or no 1 in the list."""
    marks = read_nested(value, field, where)
    fits = isinstance(marks, list) and len(marks) == count
    check(fits, marks, f"a list of {count} labels, one for each choice", field, where)
    true = [read_index(mark, f"{field}[{i}]", ("", ""), where) == 1 for i, mark in enumerate(marks)]
    check(any(true), marks, "a label that is 1", field, where)
    return tuple(i for i, is_true in enumerate(true) if is_true)


def check_choices(texts: Sequence[str], field: str, where: str, least: int = 2) -> tuple[str, ...]:
    """Returns the choices. Raises UserError: fewer than `least`, or one without any text."""
    if len(texts) < least:
        raise UserError(f"{where}: field '{field}': {len(texts)} choices, at least {least} are needed")
    for i, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"{where}: field '{field}[{i}]': empty choice")
    return tuple(texts)


def read_index(value: Any, field: str, names: Sequence[str], where: str, first: int = 0) -> int | None:
    """The index of the right choice, from 0; None for no value, which is also an empty text.

    Args:
        value: a number, also as text or with ".0", or one of `names`, of which "False" and "True" may be truth values.
        names: what the choices are called, one for each choice; "" where they have no names.
        first: the number of the first choice.

    Raises:
        UserError: another value, or a number that no choice has.
    """
    if value in (None, ""):
        return None
    count, written = len(names), value.strip() if isinstance(value, str) else value
    if isinstance(written, (str, bool)) and str(written) in names:
        return list(names).index(str(written))
    if isinstance(written, str) and re.fullmatch(r"-?\d{1,9}(\.0+)?", written):
        written = int(float(written))
    if isinstance(written, float) and written.is_integer():
        written = int(written)
    if not isinstance(written, int) or isinstance(written, bool):
        check(False, value, "the index of a choice", field, where)
    elif first <= written < first + count:
        return int(written) - first
    raise UserError(f"{where}: field '{field}': {written} is out of range, there are {count} choices")


def read_lettered(choices: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], list[str]]:
    """Choices of the form {"text": [...], "label": [...]}: the texts and their labels."""
    for part in ("text", "label"):
        if part not in choices:
            raise UserError(f"{where}: field 'choices.{part}': missing")
    texts = check_choices(read_texts(choices["text"], "choices.text", where), "choices.text", where)
    labels = read_texts(choices["label"], "choices.label", where)
    if len(labels) != len(texts):
        raise UserError(f"{where}: field 'choices.label': {len(labels)} labels for {len(texts)} choices")
    return texts, labels


def read_key(value: Any, field: str, labels: Sequence[str], where: str) -> int | None:
    """The index of the label that a row names as right; None for no value. Raises UserError: no such label."""
    if value in (None, ""):
        return None
    check(isinstance(value, str), value, "a text", field, where)
    if value.strip() not in labels:
        raise UserError(f"{where}: field '{field}': {value!r} is not among the labels {', '.join(labels)}")
    return list(labels).index(value.strip())
