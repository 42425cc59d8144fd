"""The report's fonts, and text made only of characters that the fonts can show.

Two cuts of Pretendard under another name (scripts/make_fonts.py; licence in OFL.txt), so that Korean and English look
the same on every machine, even without other fonts or a network.
"""

import functools
import unicodedata
from pathlib import Path

from cecompile.errors import printable

FAMILY, FAMILY_BOLD = "Cecompile Sans", "Cecompile Sans Bold"
REGULAR = Path(__file__).parent / "CecompileSans-Regular.ttf"
BOLD = Path(__file__).parent / "CecompileSans-Bold.ttf"


@functools.cache
def glyphs() -> frozenset[int]:
    """The code points that both fonts can draw."""
    from matplotlib.ft2font import FT2Font

    regular, bold = (frozenset(FT2Font(str(path)).get_charmap()) for path in (REGULAR, BOLD))
    return regular & bold


def shown(text: str, limit: int = 600) -> str:
    """`text` on one line, in which every character has a glyph.

    Control characters, bidirectional ones among them, and characters without a glyph become escapes such as \\u202e.
    Hangul written as separate letters, as some file systems do, is composed. A long text loses its middle.
    """
    composed = unicodedata.normalize("NFC", text)
    escaped = (c if ord(c) in glyphs() else c.encode("unicode_escape").decode("ascii") for c in composed)
    return printable("".join(escaped), limit)
