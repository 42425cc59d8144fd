"""Questions a window at a time, for datasets that are larger than memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cecompile.errors import UserError
from cecompile.tasks.question import line

WINDOW = (
    50_000  # questions; a process that plans so many HellaSwag questions at a time peaks at 1.3 GB of resident memory
)
CHARACTERS = 400_000_000  # of text to be tokenised, after which a window ends in any case


@dataclass(frozen=True, slots=True)
class Windows:
    """Questions of which one window is held at a time. Iterating reads the file again each time.

    Attributes:
        name: for messages.
        size: questions of a window at most; fewer where they are long.
        count: questions of all windows.
        number: of windows.
        digest: see `tasks.question.digest`.
        read: gives all questions, in order.
    """

    name: str
    size: int
    count: int
    number: int
    digest: str
    read: Callable[[], Iterable[Any]]

    @classmethod
    def of(cls, questions: Sequence[Any], size: int) -> "Windows":
        """Questions that are in memory already."""
        return cls.surveyed("questions", size, split(questions, size), lambda: questions)

    @classmethod
    def surveyed(
        cls, name: str, size: int, windows: Iterable[list[Any]], read: Callable[[], Iterable[Any]]
    ) -> "Windows":
        """Goes through the windows once, for what has to be known before; keeps none."""
        sha, count, number = hashlib.sha256(), 0, 0
        for window in windows:
            number += 1
            count += len(window)
            for question in window:
                sha.update(line(question))
        return cls(name, size, count, number, sha.hexdigest(), read)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Any]]:
        """The windows, none empty. Raises UserError: the questions are no longer what they were."""
        sha = hashlib.sha256()
        for window in split(self.read(), self.size):
            for question in window:
                sha.update(line(question))
            yield window
        if sha.hexdigest() != self.digest:
            raise UserError(f"{self.name}: changed while it was read")


def split(questions: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Windows of `size` questions, or fewer where they are long."""
    window: list[Any] = []
    characters = 0
    for question in questions:
        window.append(question)
        characters += question.characters
        if len(window) == size or characters >= CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window
