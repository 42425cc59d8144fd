"""Makes the small tree by which the document explains the method, with the code that lays out a run's trees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cecompile.workload.order import sort_sequences
from cecompile.workload.sequences import Sequences
from cecompile.workload.tree import TreeLayout, lay_out


@dataclass(frozen=True, slots=True)
class Example:
    """A context and its choices as a token tree.

    Attributes:
        words: (tokens,) each node's text, in preorder.
        layout: the tree.
        parent: (tokens,) each node's parent; -1 at the root.
        predicted: (node, text) of the tokens that are predicted after a node and are no node themselves.
        unshared: the number of tokens of one sequence per choice.
    """

    words: tuple[str, ...]
    layout: TreeLayout
    parent: tuple[int, ...]
    predicted: tuple[tuple[int, str], ...]
    unshared: int

    @property
    def visible(self) -> NDArray[np.bool_]:
        """(queries, keys): whether a query sees a key."""
        slots = np.arange(len(self.words))
        return (slots[None, :] <= slots[:, None]) & (slots[:, None] < self.layout.end[None, :])


def make_example(context: Sequence[str], choices: Sequence[Sequence[str]]) -> Example:
    """The tree of a context and choices, each of at least one word; a word is a token."""
    vocabulary = sorted({word for words in (context, *choices) for word in words})
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokens = [[ids[word] for word in (*context, *choice)] for choice in choices]
    sequences = Sequences.of(tokens, [len(choice) for choice in choices], [0] * len(choices))
    order = sort_sequences(sequences)
    (layout,) = lay_out(sequences, order.sequence, order.shared, rows=np.zeros(1, dtype=np.int64))
    nodes = range(len(layout.token_ids))
    parent = tuple(max((k for k in range(n) if layout.end[k] > n), default=-1) for n in nodes)
    computed = {(parent[n], int(layout.token_ids[n])) for n in nodes}
    targets, width = layout.target.reshape(-1), layout.target.shape[1]
    read = [(int(layout.position[entry // width]), int(targets[entry])) for entry in np.unique(layout.entry).tolist()]
    return Example(
        words=tuple(vocabulary[token] for token in layout.token_ids),
        layout=layout,
        parent=parent,
        predicted=tuple((node, vocabulary[token]) for node, token in read if (node, token) not in computed),
        unshared=int(sequences.input_lengths.sum()),
    )
