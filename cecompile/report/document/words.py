"""All texts of the card and the document, from texts.ini, which has English and Korean side by side.

`Words` fills in the fields in braces. The names that a run gives (clocks, phases, metrics) are not translated.
"""

import functools
from collections.abc import Mapping, Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

from cecompile.report import units

LANGUAGES = ("ko", "en")
DASH = "–"  # for an unknown value

# By language a context and choices, one token a word, from which the figure of a tree is computed.
EXAMPLES: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
    "en": (("A", "man", "sits", "on", "a"), (("red", "roof", "."), ("red", "chair", "."), ("warm", "day", "."))),
    "ko": (("고양이", "가", "따뜻한"),
           (("햇볕", "아래", "존다", "."), ("햇볕", "아래", "논다", "."), ("마루", "에서", "존다", "."))),
}  # fmt: skip


@functools.cache
def read_texts() -> dict[str, dict[str, str]]:
    """All texts by name and language."""
    parser = ConfigParser(interpolation=None, delimiters="=")
    parser.read_string(Path(__file__).with_name("texts.ini").read_text(encoding="utf-8"))
    return {name: {lang: text.replace("\n", " ") for lang, text in parser.items(name)} for name in parser.sections()}


@dataclass(frozen=True, slots=True)
class Words:
    """The texts of one language."""

    language: str

    def __call__(self, name: str, **fields: object) -> str:
        """The text of the name `name`, with its fields filled in."""
        return read_texts()[name][self.language].format(**fields)

    def seconds(self, value: float) -> str:
        return self("seconds", value=units.seconds(value))

    def percent(self, fraction: float | None) -> str:
        """A fraction of 1 in percent; None is that of data without labels."""
        return self("no_labels") if fraction is None else self("percent", value=units.percent(fraction))

    def metric(self, name: str, value: float | None) -> str:
        """A metric's value, or its standard error: in percent, but for perplexity; infinite perplexity is a dash."""
        if name != "perplexity":
            return self.percent(value)
        return DASH if value is None else f"{value:,.2f}"

    def drops(self, drop_points: Mapping[str, float | None]) -> str:
        """The drop of each metric from the baseline's, in points; a dash where there are no labels."""
        known = {name: drop for name, drop in drop_points.items() if drop is not None}
        return ", ".join(self("verdict.drop", metric=name, drop=f"{drop:.2f}") for name, drop in known.items()) or DASH
