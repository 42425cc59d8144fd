"""Token sequences, one per choice, in flat arrays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sequences:
    """n token sequences, each a context followed by a choice.

    A model reads all tokens of a sequence but the last (the inputs), and predicts the last `predicted` tokens.

    Attributes:
        token_ids: (tokens,) all sequences one after another.
        starts: (n + 1,) where each sequence begins; the last entry is the number of tokens.
        predicted: (n,) the number of predicted tokens at each sequence's end; at least 1, less than the length.
        questions: (n,) the question each sequence belongs to, ascending.
    """

    token_ids: Ints
    starts: Longs
    predicted: Ints
    questions: Ints

    @classmethod
    def of(cls, tokens: Iterable[Any], predicted: Sequence[int], questions: Sequence[int]) -> "Sequences":
        """Sequences from n >= 1 lists or arrays of tokens; for `predicted` and `questions` see above."""
        flat = [np.asarray(one, dtype=np.int32) for one in tokens]
        starts = np.cumsum([0, *map(len, flat)]).astype(np.int64)
        return cls(np.concatenate(flat), starts, np.array(predicted, np.int32), np.array(questions, np.int32))

    @classmethod
    def joined(cls, parts: Sequence["Sequences"]) -> "Sequences":
        """The sequences of all parts, at least one. The questions are numbered throughout the parts."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum(np.concatenate([[0], *(np.diff(part.starts) for part in parts)]))
        flat = ((part.token_ids, part.predicted, part.questions) for part in parts)
        token_ids, predicted, questions = map(np.concatenate, zip(*flat, strict=True))
        return cls(token_ids, starts, predicted, questions)

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def input_lengths(self) -> Longs:
        """(n,) the number of tokens that a model reads of each sequence."""
        return np.diff(self.starts) - 1

    @property
    def longest_prompt(self) -> int:
        """The most tokens that a sequence has before its predicted tokens."""
        return int((self.input_lengths - self.predicted).max()) + 1

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts together, each question's longest one."""
        prompts = self.input_lengths - self.predicted + 1
        longest = np.zeros(int(self.questions[-1]) + 1, dtype=np.int64)
        np.maximum.at(longest, self.questions, prompts)
        return int(longest.sum())

    def inputs(self, i: int) -> Ints:
        """The tokens that a model reads of sequence i."""
        return self.token_ids[self.starts[i] : self.starts[i + 1] - 1]

    def targets(self, i: int) -> Ints:
        """The tokens to predict of sequence i."""
        return self.token_ids[self.starts[i + 1] - self.predicted[i] : self.starts[i + 1]]


def stretched(starts: Longs, sizes: Longs) -> Longs:
    """The indices starts[k], ..., starts[k] + sizes[k] - 1 for every k, one stretch after another."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def shared_prefixes(sequences: Sequences, left: Longs, right: Longs) -> Longs:
    """(len(left),) the length of the common prefix of the inputs of `left[k]` and `right[k]`, for every k."""
    token_ids, starts = sequences.token_ids, sequences.starts
    lengths = np.minimum(sequences.input_lengths[left], sequences.input_lengths[right])
    out = np.zeros(len(left), dtype=np.int64)
    batch = np.cumsum(lengths) // (1 << 21)  # of about two million tokens, which bounds the index arrays below
    for part in np.split(np.flatnonzero(lengths), np.flatnonzero(np.diff(batch[lengths > 0])) + 1):
        sizes = lengths[part]
        ends = np.cumsum(sizes)
        same = token_ids[stretched(starts[left[part]], sizes)] == token_ids[stretched(starts[right[part]], sizes)]
        first_difference = np.where(same, np.repeat(ends, sizes), np.arange(len(same)))
        begins = ends - sizes
        out[part] = np.minimum.reduceat(first_difference, begins) - begins if len(part) else 0
    return out
