"""Chat questions: conversations for a model to continue, the choices they list, and how an answer is judged."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cecompile.tasks.judge import metrics_of

NEW_TOKENS = 500  # the longest answer that the 2024 contest's script allows
Message = tuple[str, str]  # (role, content)

_CHOICES = re.compile(r"^[^\S\n]*choices:\s*(\[.*)$", re.IGNORECASE | re.MULTILINE)
_SEPARATOR = re.compile(r"""(?<=['"])\s*,\s*(?=['"])""")


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """One question as a conversation to be continued.

    Attributes:
        id: the row's own identifier, or its position in the file.
        messages: at least one.
        label: the right answer's text, or None where the data has none.
    """

    id: str
    messages: tuple[Message, ...]
    label: str | None

    @property
    def choices(self) -> tuple[str, ...]:
        """The choices that the last user message lists, possibly none. Choices never change an answer."""
        asked = next((content for role, content in reversed(self.messages) if role == "user"), "")
        return find_choices(asked)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages in the form that `transformers` takes."""
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def characters(self) -> int:
        """Length of the text that is tokenised."""
        return sum(len(content) for _, content in self.messages)

    def content(self) -> list[Any]:
        """The question's parts, as plain JSON values."""
        return [self.id, self.messages, self.label]


def find_choices(text: str) -> tuple[str, ...]:
    """The items of the last list after `choices:` in a text, as text; each once, blank ones left out.

    A list is written as Python or JSON write one, with texts, numbers and truth values in it. Where quotes inside the
    items are not escaped, it is cut between quotes with a comma in between.
    """
    lists = _CHOICES.findall(text)
    if not lists:
        return ()
    written = lists[-1][: lists[-1].rfind("]") + 1]
    if not written:
        return ()
    items = _literal(written)
    if items is None:
        inside = written[1:-1].strip()
        if len(inside) < 2 or inside[0] not in "'\"" or inside[-1] not in "'\"":
            return ()
        items = [item.strip("'\"") for item in _SEPARATOR.split(inside)]
    return tuple(dict.fromkeys(item for item in items if item.strip()))


def _literal(written: str) -> list[str] | None:
    try:
        value = ast.literal_eval(written)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    if not isinstance(value, list) or not all(isinstance(item, (str, bool, int, float)) for item in value):
        return None
    try:
        return [str(item) for item in value]
    except ValueError:  # a number of more digits than Python converts
        return None


@dataclass(frozen=True, slots=True)
class AnswerSample:
    """A judged answer.

    Attributes:
        text: what the model says, in the form of `transformers`' text-generation pipeline.
        correct: whether it is the right answer, or None where there is none.
        tokens: how many tokens the model wrote, the end token included.
        in_tree: whether all of them were read from the token tree.
        decoded_tokens: how many were decoded outside it. These three are None where the pipeline itself ran.
    """

    id: str
    label: str | None
    text: str
    correct: bool | None
    tokens: int | None
    in_tree: bool | None
    decoded_tokens: int | None


def judge_answer(question: ChatQuestion, text: str, tokens: int | None, decoded_tokens: int | None) -> AnswerSample:
    """Compares an answer with the right one as the 2024 contest's script does; `tokens`: see `AnswerSample`."""
    return AnswerSample(
        id=question.id,
        label=question.label,
        text=text,
        correct=None if question.label is None else text.lstrip().replace("\n", "") == question.label,
        tokens=tokens,
        in_tree=None if decoded_tokens is None else decoded_tokens == 0,
        decoded_tokens=decoded_tokens,
    )


def answer_metrics(samples: Sequence[AnswerSample]) -> dict[str, float | None]:
    """`exact_match`, the fraction of right answers, and its standard error; None where there are no labels."""
    return metrics_of(right_answers(samples))


def right_answers(samples: Sequence[AnswerSample]) -> dict[str, list[bool | None]]:
    """The same as `right_choices` for answers."""
    return {"exact_match": [s.correct for s in samples]}
