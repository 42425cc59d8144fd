"""Results for a report, and the texts of a report's pages."""

import io
import re
from pathlib import Path

from pypdf import PdfReader

from support.runs import run_command


def evaluated(output: Path, *arguments) -> Path:
    run_command("eval", "--engine", "eager", "--device", "cpu", *arguments, "--output", output)
    return output


def pages(pdf: bytes) -> str:
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages)


def has(text: str, *wanted: str) -> None:
    """All of `wanted` are in `text`, line breaks aside."""
    flat = re.sub(r"\s+", "", text)
    assert [w for w in wanted if re.sub(r"\s+", "", w) not in flat] == []
