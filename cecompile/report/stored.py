"""Results as they lie in a directory, read back."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cecompile.errors import UserError
from cecompile.report.results import PREDICTIONS, RESULTS, SAMPLES
from cecompile.tasks.chat import AnswerSample
from cecompile.tasks.judge import Sample

_KINDS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "prediction": (int,),
    "prediction_norm": (int,),
    "loglikelihoods": (list,),
    "greedy": (list,),
    "text": (str,),
    "correct": (bool, type(None)),
    "tokens": (int, type(None)),
    "in_tree": (bool, type(None)),
    "decoded_tokens": (int, type(None)),
}


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A run's result.

    Attributes:
        name: its directory, as it was given.
        results: results.json.
        samples: samples.jsonl, in order.
        predictions: the texts of predictions.jsonl; None where there is none.
    """

    name: str
    results: dict[str, Any]
    samples: list[Sample] | list[AnswerSample]
    predictions: list[str] | None = None


def read_result(directory: Path) -> StoredResult:
    """Reads a result directory.

    Raises:
        UserError: a file is missing or is not what a run writes; names the file, the line and the field.
    """
    results = _parse(_read(directory / RESULTS), str(directory / RESULTS))
    if not isinstance(results, dict):
        raise UserError(f"{directory / RESULTS}: not an object")
    kind: Any = AnswerSample if results.get("task") == "chat" else Sample
    path = directory / SAMPLES
    samples = [_sample(row, kind, where) for where, row in _rows(path)]
    predictions = None
    if kind is AnswerSample:
        predictions = [_text(row, where) for where, row in _rows(directory / PREDICTIONS)]
    return StoredResult(str(directory), results, samples, predictions)


def value_at(results: Any, path: str) -> Any:
    """What is at a path such as "model.fingerprint"; None where nothing is."""
    for key in path.split("."):
        results = results.get(key) if isinstance(results, dict) else None
    return results


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start + 1}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None


def _rows(path: Path) -> list[tuple[str, Any]]:
    """Pairs of (place for messages, row). Only line feeds end a line: JSON may have other separators inside texts."""
    lines = enumerate(_read(path).split("\n"), 1)
    places = [(f"{path}: line {number}", line) for number, line in lines if line.strip()]
    return [(where, _parse(line, where)) for where, line in places]


def _sample(row: Any, kind: Any, where: str) -> Any:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object")
    label = (int, type(None)) if kind is Sample else (str, type(None))
    for one in fields(kind):
        if one.name not in row:
            raise UserError(f"{where}: field '{one.name}': missing")
        if not isinstance(row[one.name], _KINDS.get(one.name, label)):
            raise UserError(f"{where}: field '{one.name}': not what a run writes")
    values = {one.name: row[one.name] for one in fields(kind)}
    if kind is Sample:
        numbers = values["loglikelihoods"]
        if not numbers or not all(isinstance(x, (int, float)) for x in numbers):
            raise UserError(f"{where}: field 'loglikelihoods': not a list of numbers")
        values |= {name: tuple(values[name]) for name in ("loglikelihoods", "greedy")}
    return kind(**values)


def _text(row: Any, where: str) -> str:
    try:
        text = row[0]["generated_text"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"{where}: field 'generated_text': missing")
    return text
