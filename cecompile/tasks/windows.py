"""Questions a window at a time, for datasets that are larger than memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cecompile.errors import UserError
from cecompile.tasks.question import add_content

WINDOW = 50_000  # questions; planning as many HellaSwag questions at a time peaks at 1.3 GB of resident memory
CHARACTERS = 400_000_000  # of text to be tokenised, after which a window ends in any case

Read = Callable[[], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Windows:
    """Questions held in memory one window at a time. Each iteration reads the file again."""

    name: str  # for messages
    size: int  # the most questions in a window; fewer where questions are long
    count: int  # questions in all windows
    number: int  # windows
    digest: str  # see `tasks.question.digest`
    read: Read  # gives all questions, in order

    @classmethod
    def of(cls, questions: Sequence[Any], size: int) -> "Windows":
        """Windows of questions that are in memory already."""
        return cls.surveyed("questions", size, split(questions, size), lambda: questions)

    @classmethod
    def surveyed(cls, name: str, size: int, windows: Iterable[list[Any]], read: Read) -> "Windows":
        """Counts and digests the windows' questions, and keeps none."""
        sha, sizes = hashlib.sha256(), []
        for window in windows:
            sizes.append(len(window))
            add_content(sha, window)
        return cls(name, size, sum(sizes), len(sizes), sha.hexdigest(), read)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Any]]:
        """The windows, none empty. Raises UserError: the questions have changed since they were surveyed."""
        sha = hashlib.sha256()
        for window in split(self.read(), self.size):
            add_content(sha, window)
            yield window
        if sha.hexdigest() != self.digest:
            raise UserError(f"{self.name}: changed while it was read")


def split(questions: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cuts questions into windows of `size`, or fewer where questions are long."""
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
