"""How the fonts in cecompile/report/document/fonts were made: Pretendard (OFL 1.1), cut down to what a report needs.

    npm pack pretendard@1.3.9 && tar xzf pretendard-1.3.9.tgz
    python scripts/make_fonts.py package/dist

Kept: Latin, Greek, Cyrillic, punctuation, arrows, kana and the 2,350 Hangul syllables of KS X 1001. Pretendard is a
reserved name, which a changed version may not have (OFL, 3), so the result has another.
"""

import argparse
import shutil
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

OUT = Path(__file__).resolve().parents[1] / "cecompile" / "report" / "document" / "fonts"
FAMILY = "Cecompile Sans"
STYLES = ("Regular", "Bold")
RANGES = (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x1E00, 0x1F00), (0x2010, 0x2028), (0x2030, 0x205F),
    (0x2070, 0x2100), (0x2100, 0x2150), (0x2190, 0x2200), (0x2200, 0x2300), (0x25A0, 0x2600), (0x2713, 0x2718),
    (0x3000, 0x3100), (0xFF01, 0xFF61),
)  # fmt: skip
NOTICE = (0, 5, 8, 9, 13, 14)  # copyright, version, makers, licence: kept as they are


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pretendard", type=Path, help="the package's folder `dist`")
    source = parser.parse_args().pretendard
    OUT.mkdir(exist_ok=True)
    shutil.copyfile(source / "LICENSE.txt", OUT / "OFL.txt")
    for style in STYLES:
        font = TTFont(source / f"public/static/alternative/Pretendard-{style}.ttf", recalcTimestamp=False)
        _cut(font)
        _rename(font, style)
        font.save(OUT / f"CecompileSans-{style}.ttf")


def ks_x_1001() -> set[int]:
    """The Hangul syllables that EUC-KR encodes in two bytes."""
    rows = (bytes([lead, trail]).decode("euc-kr") for lead in range(0xB0, 0xC9) for trail in range(0xA1, 0xFF))
    return {ord(syllable) for syllable in rows}


def _cut(font: TTFont) -> None:
    options = subset.Options(layout_features=[], hinting=False, glyph_names=False, notdef_outline=True, name_IDs=["*"])
    options.drop_tables += ["DSIG"]
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=ks_x_1001().union(*(range(*pair) for pair in RANGES)))
    subsetter.subset(font)


def _rename(font: TTFont, style: str) -> None:
    names = font["name"]
    names.names = [n for n in names.names if n.nameID in NOTICE]
    file_name = f"{FAMILY.replace(' ', '')}-{style}"
    for number, text in ((1, FAMILY), (2, style), (3, file_name), (4, f"{FAMILY} {style}"), (6, file_name)):
        names.setName(text, number, 3, 1, 0x409)


if __name__ == "__main__":
    main()
