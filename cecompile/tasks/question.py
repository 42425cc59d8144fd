"""A multiple-choice question, in the form that every later step uses."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its choices, rendered as text.

    Attributes:
        id: the row's own identifier, or its position in the file.
        context: the text that every choice continues. May be empty.
        choices: non-empty texts. `delimiter` stands between the context and a choice. One choice alone is not chosen:
            its probability counts, and whether greedy decoding gives it.
        label: index of the right choice, or None where the data has none.
        delimiter: lm-evaluation-harness's `target_delimiter`; not counted in the length by which `acc_norm` divides.
        contexts: a context for each choice, in place of `context`; () where all choices continue the same text.
        true: indices of all right choices, where their probability together counts; () where one choice is right.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    label: int | None
    delimiter: str = " "
    contexts: tuple[str, ...] = ()
    true: tuple[int, ...] = ()

    @property
    def characters(self) -> int:
        """Length of the text to tokenise."""
        contexts = sum(map(len, self.contexts)) or len(self.context) * len(self.choices)
        return len(self.context) + contexts + sum(map(len, self.choices))

    def content(self) -> list[Any]:
        """The question's parts, as plain JSON values."""
        common = [self.id, self.context, self.choices, self.label, self.delimiter]
        more = [self.contexts] if self.contexts or self.true else []
        return [*common, *more, self.true] if self.true else [*common, *more]


def digest(questions: Iterable[Any]) -> str:
    """SHA-256 (hex) of the content of questions of any kind. File formats make no difference."""
    sha = hashlib.sha256()
    add_content(sha, questions)
    return sha.hexdigest()


def add_content(sha: Any, questions: Iterable[Any]) -> None:
    """Adds the content of questions to a hash: a line of JSON each."""
    for question in questions:
        sha.update(json.dumps(question.content()).encode("ascii") + b"\n")
