"""The lexicographic order of all sequences, and the prefixes that neighbours in this order share.

In a sorted list of sequences, neighbours share the longest prefixes. The prefix tree of the list has as many nodes as
the sum of (length - prefix shared with the sequence before).
"""

import itertools
from dataclasses import dataclass

import numpy as np

from cecompile.workload.sequences import Longs, Sequences, shared_prefixes


@dataclass(frozen=True, slots=True)
class Order:
    """The order that puts sequences with a common prefix side by side, and keeps each question's sequences together."""

    sequence: Longs  # (n,) the sequence at each place
    shared: Longs  # (n,) input tokens shared with the sequence at the place before; 0 at the first
    prefix_tree_tokens: int  # nodes of one prefix tree over all questions' inputs

    def typically_shared(self, sequences: Sequences) -> int:
        """The median number of tokens that a question shares with the question before; 0 for a single question."""
        boundaries = np.flatnonzero(np.diff(sequences.questions[self.sequence])) + 1
        return int(np.median(self.shared[boundaries])) if len(boundaries) else 0

    def sides(self, sequences: Sequences, boundary: int) -> list["Order"]:
        """The orders of the sequences of at most `boundary` inputs and of the longer ones, without an empty order."""
        long = sequences.input_lengths[self.sequence] > boundary
        sides = [self.sequence[side] for side in (~long, long) if side.any()]
        return [Order(side, _shared_with_previous(sequences, side), self.prefix_tree_tokens) for side in sides]


def sort_sequences(sequences: Sequences) -> Order:
    """Sorts by the inputs' token ids; questions come in the order of their first sequence."""
    content, bounds = sequences.token_ids.astype(">u4").tobytes(), (4 * sequences.starts).tolist()
    keys = [content[begin : end - 4] for begin, end in itertools.pairwise(bounds)]  # the last token is no input
    by_key = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    tree_tokens = int(sequences.input_lengths.sum() - _shared_with_previous(sequences, by_key).sum())
    owner = sequences.questions[by_key]
    _, first_place = np.unique(owner, return_index=True)  # ascending question ids: 0, 1, 2, ...
    grouped = by_key[np.argsort(first_place[owner], kind="stable")]
    return Order(grouped, _shared_with_previous(sequences, grouped), tree_tokens)


def _shared_with_previous(sequences: Sequences, ordered: Longs) -> Longs:
    """(n,) input tokens that each sequence shares with the sequence before; 0 for the first."""
    return np.concatenate(([0], shared_prefixes(sequences, ordered[:-1], ordered[1:])))
