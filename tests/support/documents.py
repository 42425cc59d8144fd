"""The texts of a report's pages."""

import io
import re

from pypdf import PdfReader


def pages(pdf: bytes) -> str:
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages)


def has(text: str, *wanted: str) -> None:
    """All of `wanted` are in `text`, line breaks aside."""
    flat = re.sub(r"\s+", "", text)
    assert [w for w in wanted if re.sub(r"\s+", "", w) not in flat] == []
