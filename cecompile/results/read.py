"""Reads results back from a directory: whole, or as far as a card and a document need them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from cecompile.errors import UserError
from cecompile.results.clock import CLOCKS, PHASES
from cecompile.results.write import PREDICTIONS, RESULTS, SAMPLES, SCHEMA
from cecompile.tasks.chat import AnswerSample
from cecompile.tasks.judge import METRICS, Sample


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A run's result.

    Attributes:
        name: its directory, as it was given.
        results: results.json.
        samples: samples.jsonl, in order.
        predictions: the texts of predictions.jsonl; None for a task without that file.
    """

    name: str
    results: dict[str, Any]
    samples: list[Sample] | list[AnswerSample]
    predictions: list[str] | None = None


def read_result(directory: Path) -> StoredResult:
    """Reads a result directory.

    Raises:
        UserError: a file is missing or damaged; the message names the file, the line and the field.
    """
    results = _read_json(directory)
    if not isinstance(results, dict):
        raise UserError(f"{directory / RESULTS}: not an object")
    chats = results.get("task") == "chat"
    samples = _samples(directory / SAMPLES, AnswerSample if chats else Sample)
    predictions = [_text(row, where) for where, row in _rows(directory / PREDICTIONS)] if chats else None
    return StoredResult(str(directory), results, samples, predictions)


def value_at(results: Any, path: str) -> Any:
    """The value at a path such as "model.fingerprint"; None for a missing path."""
    for key in path.split("."):
        results = results.get(key) if isinstance(results, dict) else None
    return results


def _read_json(directory: Path, constant: Callable[[str], Any] | None = None) -> Any:
    """The content of results.json; `constant` makes the value of NaN and Infinity."""
    path = directory / RESULTS
    return _parse(_read(path), f"{path}: damaged", constant)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged: not UTF-8 at byte {error.start + 1}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; is {path.parent} a result directory?") from None


def _parse(text: str, problem: str, constant: Callable[[str], Any] | None = None) -> Any:
    try:
        return json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{problem}: {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Pairs of (place for messages, row). Only line feeds end a line: JSON may have other separators inside texts."""
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            yield f"{path}: line {number}", _parse(line, f"{path}: line {number}: not valid JSON")


def _samples(path: Path, kind: type[Any]) -> list[Any]:
    """The samples of a file; a field of `kind` that is a tuple is a list there."""
    samples, hints = [], get_type_hints(kind)
    optional = {field.name for field in fields(kind) if field.default is not MISSING}
    for where, row in _rows(path):
        if not isinstance(row, dict):
            raise UserError(f"{where}: not an object")
        values = {}
        for name, hint in hints.items():
            if name not in row and name in optional:
                continue
            if name not in row:
                raise UserError(f"{where}: field '{name}': missing")
            is_tuple = get_origin(hint) is tuple
            if not isinstance(row[name], list if is_tuple else hint):
                raise UserError(f"{where}: field '{name}': not what a run writes")
            values[name] = tuple(row[name]) if is_tuple else row[name]
        numbers = values.get("loglikelihoods")  # None in an AnswerSample
        if numbers is not None and not (numbers and all(isinstance(x, (int, float)) for x in numbers)):
            raise UserError(f"{where}: field 'loglikelihoods': not a list of numbers")
        samples.append(kind(**values))
    return samples


def _text(row: Any, where: str) -> str:
    try:
        text = row[0]["generated_text"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"{where}: field 'generated_text': missing")
    return text


# The shape of results.json: a type, [the shape of each element], {name: shape}, or {str: shape} where names are free.
# A tuple holds alternatives; with None among them the field may be null or absent. `float` takes whole numbers too.
# Fields that are not named here are let through.
SHAPE: dict[str, Any] = {
    "task": str,
    "date": (str, None),
    "command": ([str], None),
    "questions": int,
    "choices": int,
    "truncated_questions": (int, None),
    "metrics": {str: (float, None)},
    "answers": ({
        "in_tree": (int, None), "tokens": (int, None), "decoded_tokens": (int, None), "max_new_tokens": int,
    }, None),
    "latency_s": dict.fromkeys(CLOCKS, float),
    "headline": {"clock": str, "seconds": (float, None)},
    "phases_s": dict.fromkeys(PHASES, float),
    "inference_s": {"runs": int, "median": float, "min": float, "max": float},
    "engine": {
        "name": str, "attention": (str, None), "note": (str, None),
        "choice": ({"engine": str, "lacking": int, "compile_s": float, "saved_s": float}, None),
    },
    "plan": ({
        "useful_tokens": int, "slots": int, "unshared_tokens": int, "question_tree_tokens": int,
        "prefix_tree_tokens": int, "windows": (int, None),
        "buckets": [{"rows": int, "length": int, "readouts": int, "runs": int, "useful_tokens": (int, None)}],
    }, None),
    "streaming": ({
        "sweeps": int, "passes_per_sweep": int, "layer_bytes": int, "read_bytes": int, "read_seconds": float,
        "waited_seconds": float,
    }, None),
    "model": {
        "name": str, "architecture": str, "dtype": str, "parameters": int, "fingerprint": str,
        "device_fingerprint": (str, None), "verified": (str, None), "stored_dtypes": ({str: int}, [str], None),
        "changed": ({"attention": (str, None), "compiled": ({str: int}, None), "replaced_modules": ([str], None)}, None)
    },
    "cache": ({"state": str, "reason": (str, None)}, None),
    "memory": {"limit_bytes": (int, None), "predicted_bytes": (int, None), "peak_bytes": (int, None)},
    "ranks": ({"size": int, "passes": [int], "tokens": [int], "devices": [str]}, None),
    "pipeline": ({"stages": int, "layers": [[int]]}, None),
    "data": {"name": str, "digest": str},
    "environment": {"device": str, "python": str, "system": str, "cpus": (int, None), "versions": {str: (str, None)}},
    "comparison": ({
        "baseline": str, "max_drop": float, "drop_points": {str: (float, None)}, "agreement": (float, None),
        "interval_points": {str: ([float], None)}, "largest_difference": (float, None), "differing": (int, None),
        "speed_ratio": (float, None), "verdict": str,
    }, None),
}  # fmt: skip
LARGEST = 1e15  # no time, count or size comes near it
NAMES = {str: "a string", int: "a whole number", float: "a number"}


def read_results(directory: Path) -> dict[str, Any]:
    """Reads results.json of a result directory; a field of SHAPE that is absent there is None.

    Raises:
        UserError: the file is missing or damaged, its schema is another, or a field is not of its shape.
    """
    results, path = _read_json(directory, _no_constant), directory / RESULTS
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
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
    if isinstance(shape, tuple):
        if value is None:
            return None
        shapes = [one for one in shape if one is not None]
        shape = shapes[0 if isinstance(value, dict) else -1]  # of two alternatives, the object comes first
    if isinstance(shape, dict) and isinstance(value, dict):
        if str in shape:
            return {key: _checked(one, shape[str], where, f"{name}.{key}") for key, one in value.items()}
        inner = {k: _checked(value.get(k), s, where, f"{name}.{k}" if name else k) for k, s in shape.items()}
        return value | inner
    if isinstance(shape, list) and isinstance(value, list):
        return [_checked(one, shape[0], where, f"{name}[{i}]") for i, one in enumerate(value)]
    wanted = "an object" if isinstance(shape, dict) else "an array" if isinstance(shape, list) else NAMES[shape]
    plain = (int, float) if shape is float else shape
    if isinstance(shape, type) and isinstance(value, plain) and not isinstance(value, bool):
        if isinstance(value, str) or abs(value) <= LARGEST:
            return value
        wanted += f" up to {LARGEST:.0e}"
    raise UserError(f"{where}{name}': expected {wanted}, found {json.dumps(value)[:60]}")
