"""The lexicographic order of all sequences, and what it says about sharing.

In a sorted list of sequences, consecutive ones share the longest prefixes, and the number of nodes of their prefix
tree is the sum of (length - prefix shared with the one before). Everything about sharing follows from this.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cecompile.workload.sequences import Longs, Sequences, shared_prefixes


@dataclass(frozen=True, slots=True)
class Order:
    """Sequences sorted so that what can share a prefix is adjacent, each question's sequences side by side.

    Attributes:
        sequence: (n,) the sequence at each place.
        shared: (n,) input tokens shared with the sequence at the place before; 0 at the first.
        prefix_tree_tokens: nodes of the prefix tree over all inputs, whatever question they belong to.
    """

    sequence: Longs
    shared: Longs
    prefix_tree_tokens: int

    def typically_shared(self, sequences: Sequences) -> int:
        """The median of what a question shares with the one before; 0 for a single question."""
        owner = sequences.questions[self.sequence]
        boundaries = np.flatnonzero(owner[1:] != owner[:-1]) + 1
        return int(np.median(self.shared[boundaries])) if len(boundaries) else 0

    def sides(self, sequences: Sequences, boundary: int) -> list["Order"]:
        """Those of at most `boundary` inputs, and those of more, where there are any; nothing is shared between."""
        long = sequences.input_lengths[self.sequence] > boundary
        return [self._only(sequences, side) for side in (~long, long) if side.any()]

    def _only(self, sequences: Sequences, chosen: NDArray[np.bool_]) -> "Order":
        kept = self.sequence[chosen]
        shared = np.concatenate(([0], shared_prefixes(sequences, kept[:-1], kept[1:])))
        return Order(kept, shared, self.prefix_tree_tokens)


def sort_sequences(sequences: Sequences) -> Order:
    """Sorts by the inputs' token ids; questions come in the order of their first sequence."""
    content, bounds = sequences.token_ids.astype(">u4").tobytes(), (4 * sequences.starts).tolist()
    keys = [content[begin : end - 4] for begin, end in itertools.pairwise(bounds)]  # without what is only predicted
    by_key = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    tree_tokens = int(sequences.input_lengths.sum() - shared_prefixes(sequences, by_key[:-1], by_key[1:]).sum())

    owner = sequences.questions[by_key]
    _, first_place = np.unique(owner, return_index=True)  # ascending question ids: 0, 1, 2, ...
    grouped = by_key[np.argsort(first_place[owner], kind="stable")]
    shared = np.concatenate(([0], shared_prefixes(sequences, grouped[:-1], grouped[1:])))
    return Order(grouped, shared, tree_tokens)
