"""A multiple-choice question, in the form every later step uses."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its choices, rendered as text.

    Attributes:
        id: the row's own identifier, or its position in the file.
        context: the text every choice continues. May be empty.
        choices: two or more non-empty texts. `delimiter` stands between the context and a choice.
        label: index of the right choice, or None where the data has none.
        delimiter: lm-evaluation-harness's `target_delimiter`; not counted in the length that `acc_norm` divides by.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    label: int | None
    delimiter: str = " "

    @property
    def characters(self) -> int:
        """Length of the text that is tokenised."""
        return len(self.context) * (1 + len(self.choices)) + sum(map(len, self.choices))

    def content(self) -> list[Any]:
        """The question's parts, as plain JSON values."""
        return [self.id, self.context, self.choices, self.label, self.delimiter]


class HasContent(Protocol):
    """A question of any kind."""

    def content(self) -> list[Any]:
        """The question's parts, as plain JSON values."""


def digest(questions: Iterable[HasContent]) -> str:
    """SHA-256 (hex) of the questions' content, the same whatever file format they came in."""
    sha = hashlib.sha256()
    for q in questions:
        sha.update(line(q))
    return sha.hexdigest()


def line(question: HasContent) -> bytes:
    """A question's content as a line of JSON, for a digest."""
    return json.dumps(question.content()).encode("ascii") + b"\n"
