"""Writes results.json, samples.jsonl and predictions.jsonl, each whole or not at all."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cecompile.errors import UserError, file_errors, writing
from cecompile.results import journal
from cecompile.results.spool import Spool, line
from cecompile.workload.plan import Plan
from cecompile.workload.totals import Totals

SCHEMA = 1
RESULTS, SAMPLES, PREDICTIONS = "results.json", "samples.jsonl", "predictions.jsonl"
_TRIAL = ".cecompile-"  # begins the name of a directory made to see whether one can be made
CARD, DOCUMENT = "card.png", "report.pdf"  # made from the result by `cecompile report`


def plan_summary(plan: Plan | Totals) -> dict[str, Any]:
    """The `plan` of results.json: token counts, and how often each bucket runs.

    For a run in windows, `windows` is their number and the counts are sums over the windows. Prefixes are shared within
    a window; so `prefix_tree_tokens` counts one prefix tree for each window.
    """
    summary: dict[str, Any] = {
        "useful_tokens": plan.useful_tokens,
        "slots": plan.slots,
        "unshared_tokens": plan.unshared_tokens,
        "question_tree_tokens": plan.question_tree_tokens,
        "prefix_tree_tokens": plan.prefix_tree_tokens,
        "buckets": [
            dataclasses.asdict(b) | {"runs": plan.runs(i), "useful_tokens": plan.useful_tokens_of(i)}
            for i, b in enumerate(plan.buckets)
        ],
    }
    if isinstance(plan, Totals):
        summary["windows"] = plan.windows
    if plan.decoding is not None:
        summary["decoding"] = dataclasses.asdict(plan.decoding)
    return summary


def environment(device_name: str) -> dict[str, Any]:
    """The versions and the machine that a result may depend on."""
    versions: dict[str, str | None] = {}
    for name in ("cecompile", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": device_name,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "versions": versions,
    }


def prepare_output(directory: Path, overwrite: bool, resume: bool = False, data: str = "") -> None:
    """Checks that results can be written to `directory`, before any work is done. Leaves nothing behind.

    `data` names the questions that are to be read.

    Raises:
        UserError: `data` is a file of the results in `directory`.
        UserError: `directory` is a file, cannot be written, holds other files, or holds results or a journal without
            `overwrite` (replace them) or, for the journal, `resume` (go on with it).
    """
    with file_errors(f"{directory}: cannot be read"):
        is_file = os.path.lexists(directory) and not directory.is_dir()
        held = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
    if is_file:
        raise UserError(f"{directory}: is a file, or a link to nothing; --output names a directory")
    if data and any(same_file(Path(data), directory / name) for name in (RESULTS, SAMPLES, PREDICTIONS)):
        raise UserError(f"{data}: is a file of the results in --output {directory}; choose another --output")
    journaled = bool(journal.journals_in(directory))
    held = {name for name in held if not journal.is_journal(name) and not name.startswith(_TRIAL)}
    if held and not journaled and not held & {RESULTS, SAMPLES, PREDICTIONS}:
        raise UserError(f"{directory}: not empty and not a result directory; choose another --output")
    if (held or journaled) and not overwrite and not resume:
        if journaled:
            raise UserError(f"{directory}: holds an interrupted run; --resume goes on with it, --overwrite starts anew")
        raise UserError(f"{directory}: holds results already; --overwrite replaces them")
    if not overwrite:
        refuse_results(directory)
    parent = next(path for path in (directory, *directory.parents) if path.exists())
    with file_errors(f"{directory}: cannot be written: {parent}"):
        tempfile.TemporaryDirectory(prefix=_TRIAL, dir=parent).cleanup()


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, or would if the file were there."""
    with contextlib.suppress(OSError, ValueError):
        if one.samefile(other):
            return True
    with contextlib.suppress(OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)
    return False  # not even a path


def refuse_results(directory: Path) -> None:
    """Raises UserError if `directory` holds results, which another run has written during this one."""
    if os.path.lexists(directory / RESULTS):
        raise UserError(f"{directory}: holds results that another run has written; move them elsewhere")


def write_samples(directory: Path, samples: Sequence[Any] | Spool) -> None:
    """Writes samples.jsonl, one line per sample (a dataclass), after removing an earlier run's other files.

    Raises:
        UserError: the file system refuses.
    """
    with writing(directory):
        for name in (RESULTS, PREDICTIONS, CARD, DOCUMENT):
            (directory / name).unlink(missing_ok=True)
    write_whole(directory / SAMPLES, samples.lines() if isinstance(samples, Spool) else map(line, samples))


def write_predictions(directory: Path, texts: Iterable[str]) -> None:
    """Writes predictions.jsonl, one line per answer in the form of the text-generation pipeline.

    Raises:
        UserError: the file system refuses.
    """
    write_whole(directory / PREDICTIONS, (json.dumps([{"generated_text": text}]) + "\n" for text in texts))


def file_digests(directory: Path) -> dict[str, str]:
    """The `samples_digest` of results.json: SHA-256 (hex) of samples.jsonl and, for chats, of predictions.jsonl."""
    files = [directory / name for name in (SAMPLES, PREDICTIONS)]
    return {file.name: _digest(file) for file in files if file.is_file()}


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()


def digest_of_results(results: dict[str, Any]) -> str:
    """SHA-256 (hex) over everything in results.json but `digest`, as JSON with sorted keys and no white space."""
    rest = {key: value for key, value in results.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """Writes results.json, the last file of a run, and removes half-written files of runs that were killed.

    Raises:
        UserError: the file system refuses.
    """
    write_whole(directory / RESULTS, [json.dumps(results, indent=2) + "\n"])
    with writing(directory):
        for name in (RESULTS, SAMPLES, PREDICTIONS):
            for left in directory.glob(f".{name}.*"):
                left.unlink(missing_ok=True)


def write_whole(path: Path, parts: Iterable[str | bytes]) -> None:
    """Writes a file under a temporary name in the same directory, then renames it.

    Raises:
        UserError: the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.writelines(part.encode() if isinstance(part, str) else part for part in parts)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
