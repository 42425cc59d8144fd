"""Token trees in DFS preorder.

Sequences that begin with the same tokens are merged into a tree. Written in preorder, a tree needs one integer per
token to say who sees whom: `end[k]`, one past the last token of k's subtree. Key k is visible to query q iff
k <= q < end[k]. A token's position id is its depth.
"""

from dataclasses import dataclass

import numpy as np

from cecompile.workload.sequences import Ints, Longs, Sequences


@dataclass(frozen=True, slots=True)
class Layout:
    """Trees side by side in preorder, and where their sequences are read out.

    Attributes:
        token_ids, depth, end: (tokens,) per node. `end` counts from the layout's first token.
        position: (readouts,) the node whose output predicts `target`.
        target: (readouts,) the token predicted.
        choice: (readouts,) the sequence it belongs to.
    """

    token_ids: Ints
    depth: Ints
    end: Ints
    position: Ints
    target: Ints
    choice: Ints


def lay_out(sequences: Sequences, members: Longs, shared: Longs) -> Layout:
    """Merges `members` into trees.

    Args:
        sequences: all sequences.
        members: (m,) the sequences to lay out, in order.
        shared: (m,) how many leading nodes each takes over from the one before it; 0 begins a new tree. At most the
            length of their common prefix.

    Returns:
        Nodes in preorder, members' readouts one member after another.
    """
    lengths = sequences.input_lengths[members]
    total = int((lengths - shared).sum())
    token_ids = np.empty(total, dtype=np.int32)
    depth = np.empty(total, dtype=np.int32)
    end = np.full(total, total, dtype=np.int32)
    path = np.empty(int(lengths.max(initial=0)), dtype=np.int32)  # nodes from the root to the last member's leaf
    positions, targets = [], []
    at = open_length = 0
    for i, length, kept in zip(members.tolist(), lengths.tolist(), shared.tolist(), strict=True):
        end[path[kept:open_length]] = at  # nodes that the new branch leaves behind end here
        new = length - kept
        token_ids[at : at + new] = sequences.inputs(i)[kept:]
        depth[at : at + new] = np.arange(kept, length)
        path[kept:length] = np.arange(at, at + new)
        at, open_length = at + new, length
        positions.append(path[length - sequences.readouts[i] : length].copy())
        targets.append(sequences.targets(i))
    return Layout(
        token_ids,
        depth,
        end,
        position=np.concatenate(positions),
        target=np.concatenate(targets),
        choice=np.repeat(members, sequences.readouts[members]).astype(np.int32),
    )
