"""Chat questions: conversations for a model to continue, the choices they list, and how an answer is judged."""

import ast
import re
from collections.abc import Sequence
from contextlib import suppress
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
        return find_choices(next((content for role, content in reversed(self.messages) if role == "user"), ""))

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages in the form that `transformers` takes."""
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def characters(self) -> int:
        """Length of the text to tokenise."""
        return sum(len(content) for _, content in self.messages)

    def content(self) -> list[Any]:
        """The question's parts, as plain JSON values."""
        return [self.id, self.messages, self.label]


def find_choices(text: str) -> tuple[str, ...]:
    """The items of the last list after `choices:` in a text, as text; each once, without blank items.

    A list is written in Python or JSON, and holds texts, numbers and truth values. Where quotes inside the items are
    not escaped, the list is cut between quotes with a comma in between.
    """
    after_mark = (_CHOICES.findall(text) or [""])[-1]
    written = after_mark[: after_mark.rfind("]") + 1]
    items = None
    with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        value = ast.literal_eval(written)
        if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
            items = [str(item) for item in value]  # ValueError for a number of more digits than Python converts
    if items is None:
        inside = written[1:-1].strip()
        if len(inside) < 2 or inside[0] not in "'\"" or inside[-1] not in "'\"":
            return ()
        items = [item.strip("'\"") for item in _SEPARATOR.split(inside)]
    return tuple(dict.fromkeys(item for item in items if item.strip()))


@dataclass(frozen=True, slots=True)
class AnswerSample:
    """A judged answer. The last three fields are None where the text-generation pipeline itself ran."""

    id: str
    label: str | None
    text: str  # the model's answer, in the form of `transformers`' text-generation pipeline
    correct: bool | None  # whether `text` is the right answer; None without a label
    tokens: int | None  # tokens that the model wrote, including the end token
    in_tree: bool | None  # whether all tokens were read from the token tree
    decoded_tokens: int | None  # tokens decoded outside the tree


def judge_answer(question: ChatQuestion, text: str, tokens: int | None, decoded_tokens: int | None) -> AnswerSample:
    """Compares an answer with the right one as the 2024 contest's script does; `tokens`: see `AnswerSample`."""
    correct = None if question.label is None else text.lstrip().replace("\n", "") == question.label
    in_tree = None if decoded_tokens is None else decoded_tokens == 0
    return AnswerSample(question.id, question.label, text, correct, tokens, in_tree, decoded_tokens)


def answer_metrics(samples: Sequence[AnswerSample]) -> dict[str, float | None]:
    """`exact_match`, the fraction of right answers, and its standard error; None without labels."""
    return metrics_of(values_by_metric(samples))


def values_by_metric(samples: Sequence[AnswerSample]) -> dict[str, list[bool | None]]:
    """By metric, which answers are right; see `judge.values_by_metric`."""
    return {"exact_match": [s.correct for s in samples]}
