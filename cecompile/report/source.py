"""Reading results.json back, as far as a card and a document need it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cecompile.errors import UserError
from cecompile.report.clock import CLOCKS, PHASES
from cecompile.report.results import RESULTS, SCHEMA
from cecompile.report.units import METRICS


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
