"""Token trees in DFS preorder.

Sequences that begin with the same tokens are merged into a tree. Written in preorder, a tree needs one integer per
token to say who sees whom: `end[k]`, one past the last token of k's subtree. Key k is visible to query q iff
k <= q < end[k]. A token's position id is its depth.
"""

from dataclasses import dataclass

import numpy as np

from cecompile.workload.sequences import Ints, Longs, Sequences

TARGETS = 4  # tokens that one readout looks up: the model's head runs once for siblings


@dataclass(frozen=True, slots=True)
class Layout:
    """Trees side by side in preorder, and where their sequences are read out.

    A readout is a node and up to TARGETS tokens that may follow it; a node with more has several readouts.

    Attributes:
        token_ids, depth, end: (tokens,) per node. `end` counts from the layout's first token.
        position: (readouts,) the node.
        target: (readouts, TARGETS) the tokens, those unused 0.
        choice: (predictions,) the sequence of which a token is predicted.
        entry: (predictions,) that token's place in `target`, flattened.
    """

    token_ids: Ints
    depth: Ints
    end: Ints
    position: Ints
    target: Ints
    choice: Ints
    entry: Ints


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
        positions.append(path[length - sequences.predicted[i] : length].copy())
        targets.append(sequences.targets(i))
    position, target, entry = _readouts(np.concatenate(positions), np.concatenate(targets))
    choice = np.repeat(members, sequences.predicted[members]).astype(np.int32)
    return Layout(token_ids, depth, end, position, target, choice, entry)


def _readouts(node: Ints, token: Ints) -> tuple[Ints, Ints, Ints]:
    """Gathers the predictions (node, token) into readouts: position, target and entry of a `Layout`."""
    pairs, pair_of = np.unique((node.astype(np.int64) << 32) | token, return_inverse=True)
    of_node, token_of = (pairs >> 32).astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32)
    new_node = np.diff(of_node, prepend=-1) != 0
    first = np.flatnonzero(new_node)
    rank = np.arange(len(pairs)) - np.repeat(first, np.diff(np.append(first, len(pairs))))  # among the node's tokens
    readout = np.cumsum(rank % TARGETS == 0) - 1
    place = readout * TARGETS + rank % TARGETS
    target = np.zeros((int(readout[-1]) + 1, TARGETS), dtype=np.int32)
    target.reshape(-1)[place] = token_of
    return of_node[rank % TARGETS == 0], target, place[pair_of].astype(np.int32)
