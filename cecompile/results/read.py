"""Results as they lie in a directory, read back: whole, or as far as a card and a document need them."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cecompile.errors import UserError
from cecompile.results.clock import CLOCKS, PHASES
from cecompile.results.write import PREDICTIONS, RESULTS, SAMPLES, SCHEMA
from cecompile.tasks.chat import AnswerSample
from cecompile.tasks.judge import METRICS, Sample

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
    """The value at a path such as "model.fingerprint"; None where there is none."""
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


@dataclass(frozen=True, slots=True)
class Maybe:
    """A field that may be null or absent."""

    shape: Any


@dataclass(frozen=True, slots=True)
class Each:
    """An object with any names, all of whose values have one shape."""

    shape: Any


@dataclass(frozen=True, slots=True)
class Either:
    """A field that has one of two shapes; `first` is that of an object."""

    first: Each
    second: Any


# A type, [the shape of each element], or {name: shape}. `float` takes whole numbers too; other fields are let through.
SHAPE = {
    "task": str,
    "date": Maybe(str),
    "command": Maybe([str]),
    "questions": int,
    "choices": int,
    "truncated_questions": Maybe(int),
    "metrics": Each(Maybe(float)),
    "answers": Maybe({
        "in_tree": Maybe(int), "tokens": Maybe(int), "decoded_tokens": Maybe(int), "max_new_tokens": int,
    }),
    "latency_s": dict.fromkeys(CLOCKS, float),
    "headline": {"clock": str, "seconds": Maybe(float)},
    "phases_s": dict.fromkeys(PHASES, float),
    "inference_s": {"runs": int, "median": float, "min": float, "max": float},
    "engine": {"name": str, "attention": Maybe(str), "note": Maybe(str)},
    "plan": Maybe({
        "useful_tokens": int, "slots": int, "unshared_tokens": int, "question_tree_tokens": int,
        "prefix_tree_tokens": int, "windows": Maybe(int),
        "buckets": [{"rows": int, "length": int, "readouts": int, "runs": int, "useful_tokens": Maybe(int)}],
    }),
    "streaming": Maybe({
        "sweeps": int, "passes_per_sweep": int, "layer_bytes": int, "read_bytes": int, "read_seconds": float,
        "waited_seconds": float,
    }),
    "model": {
        "name": str, "architecture": str, "dtype": str, "parameters": int, "fingerprint": str,
        "device_fingerprint": Maybe(str), "verified": Maybe(str), "stored_dtypes": Maybe(Either(Each(int), [str])),
        "changed": Maybe({"attention": Maybe(str), "compiled": Maybe(Each(int)), "replaced_modules": Maybe([str])}),
    },
    "cache": Maybe({"state": str, "reason": Maybe(str)}),
    "memory": {"limit_bytes": Maybe(int), "predicted_bytes": Maybe(int), "peak_bytes": Maybe(int)},
    "ranks": Maybe({"size": int, "passes": [int], "tokens": [int], "devices": [str]}),
    "pipeline": Maybe({"stages": int, "layers": [[int]]}),
    "data": {"name": str, "digest": str},
    "environment": {
        "device": str, "python": str, "system": str, "cpus": Maybe(int), "versions": Each(Maybe(str)),
    },
    "comparison": Maybe({
        "baseline": str, "max_drop": float, "drop_points": Each(Maybe(float)), "interval_points": Each(Maybe([float])),
        "agreement": Maybe(float), "largest_difference": Maybe(float), "differing": Maybe(int),
        "speed_ratio": Maybe(float), "verdict": str,
    }),
}  # fmt: skip
LARGEST = 1e15  # no time, count or size comes near it
NAMES = {str: "a string", int: "a whole number", float: "a number"}


def read_results(directory: Path) -> dict[str, Any]:
    """A result directory's results.json, with every field of SHAPE in it; those that may be absent are None then.

    Raises:
        UserError: there is none, it is damaged, its schema is another, or a field is not what it should be.
    """
    path = directory / RESULTS
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; is {directory} a result directory?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: damaged: not UTF-8") from None
    try:
        results = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else None
        raise UserError(f"{path}: field 'schema': expected {SCHEMA}, found {json.dumps(found)}")
    checked: dict[str, Any] = _checked(results, SHAPE, f"{path}: field '", "")
    if checked["headline"]["clock"] not in CLOCKS:
        raise UserError(f"{path}: field 'headline.clock': expected one of {', '.join(CLOCKS)}")
    if checked["headline"]["seconds"] is None:
        raise UserError(f"{path}: of a run that was interrupted and resumed: it has no latency to show")
    if checked["questions"] < 1:
        raise UserError(f"{path}: field 'questions': expected at least 1")
    if not set(checked["metrics"]) & set(METRICS):
        raise UserError(f"{path}: field 'metrics': expected one of {', '.join(METRICS)}")
    return checked


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _checked(value: Any, shape: Any, where: str, name: str) -> Any:
    """`value` if it has the shape, with absent fields filled in; `name` is its path in the file."""
    if isinstance(shape, Maybe):
        return None if value is None else _checked(value, shape.shape, where, name)
    if isinstance(shape, Either):
        shape = shape.first if isinstance(value, dict) else shape.second
    wanted = "an object" if isinstance(shape, dict | Each) else "an array" if isinstance(shape, list) else NAMES[shape]
    if isinstance(shape, dict) and isinstance(value, dict):
        inner = {k: _checked(value.get(k), s, where, f"{name}.{k}" if name else k) for k, s in shape.items()}
        return value | inner
    if isinstance(shape, Each) and isinstance(value, dict):
        return {k: _checked(v, shape.shape, where, f"{name}.{k}") for k, v in value.items()}
    if isinstance(shape, list) and isinstance(value, list):
        return [_checked(v, shape[0], where, f"{name}[{i}]") for i, v in enumerate(value)]
    plain = (int, float) if shape is float else shape
    if isinstance(shape, type) and isinstance(value, plain) and not isinstance(value, bool):
        if isinstance(value, str) or abs(value) <= LARGEST:
            return value
        wanted += f" up to {LARGEST:.0e}"
    raise UserError(f"{where}{name}': expected {wanted}, found {json.dumps(value)[:60]}")
