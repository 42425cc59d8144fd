"""The open source that a result rests on: names, versions and licences that the installed packages state."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

USED = (
    "torch", "triton", "transformers", "tokenizers", "datasets", "pyarrow", "sentencepiece", "protobuf", "safetensors",
    "click", "filelock", "rich", "numpy", "matplotlib", "reportlab",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Credit:
    """A package; `licence` is None where the package states none."""

    name: str
    version: str
    licence: str | None


def credits(versions: Mapping[str, str | None]) -> list[Credit]:
    """The packages of USED that the run had.

    Args:
        versions: of the run, by package (`environment.versions` of results.json), None for a missing package. For a
            package that is not named there the installed version counts.
    """
    found = []
    for name in USED:
        try:
            about = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            about = None
        version = versions[name] if name in versions else about and about["Version"]
        if version:
            found.append(Credit(name, version, _licence(about) if about else None))
    return found


def _licence(about: metadata.PackageMetadata) -> str | None:
    """An SPDX expression, else the trove classifiers, else the first line of the older field."""
    fields = about.json
    classifiers = fields.get("classifier", [])
    prefix = "License :: OSI Approved :: "
    trove = [c.removeprefix(prefix) for c in classifiers if c.startswith(prefix)]
    older = str(fields.get("license", "")).strip().splitlines()
    expression = fields.get("license_expression")
    return str(expression) if expression else ", ".join(trove) or (older[0] if older else None)
