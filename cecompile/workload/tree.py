"""Token trees in DFS preorder.

Sequences that begin with the same tokens are merged into a tree. In preorder, one integer per token gives the attention
mask: `end[k]`, one past the last token of k's subtree. Key k is visible to query q iff k <= q < end[k]. A token's
position id is its depth.
"""

from dataclasses import dataclass

import numpy as np

from cecompile.workload.sequences import Ints, Longs, Sequences, stretched

TARGETS = 4  # tokens that one readout looks up, so that the model's head runs once for siblings


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """Trees side by side in preorder, and where their sequences are read out.

    A readout is a node and up to TARGETS tokens that may follow. A node with more such tokens has several readouts.

    Attributes:
        token_ids, depth, end: (tokens,) per node. `end` counts from the layout's first token.
        position: (readouts,) the node.
        target: (readouts, TARGETS) the tokens; unused entries are 0.
        choice: (predictions,) the sequence that a predicted token belongs to.
        entry: (predictions,) the predicted token's index in `target`, flattened.
    """

    token_ids: Ints
    depth: Ints
    end: Ints
    position: Ints
    target: Ints
    choice: Ints
    entry: Ints


def lay_out(sequences: Sequences, members: Longs, shared: Longs, rows: Longs) -> list[TreeLayout]:
    """Merges `members` into trees, row by row.

    Args:
        sequences: all sequences.
        members: (m,) the sequences to lay out, in order.
        shared: (m,) leading nodes that each member takes over from the member before, at most their common prefix; 0
            begins a new tree.
        rows: (r,) the member at which each row begins, ascending from 0; this member takes over nothing.

    Returns:
        Each row's nodes in preorder, with the readouts of one member after another.
    """
    lengths = sequences.input_lengths[members]
    new = lengths - shared
    first_node = np.concatenate(([0], np.cumsum(new)))  # of each member, over all rows
    first_member = np.append(rows, len(members))
    first_in_row = first_node[first_member]
    member = np.repeat(np.arange(len(members)), new)
    depth = np.arange(len(member)) - (first_node[:-1] - shared)[member]
    token_ids = sequences.token_ids[sequences.starts[members][member] + depth]
    before, after = _nearest_shallower(shared)
    end = first_node[_follow(after, np.append(shared, 0), member + 1, depth)]

    predicted = sequences.predicted[members].astype(np.int64)
    reading = np.repeat(np.arange(len(members)), predicted)
    at_depth = stretched(lengths - predicted, predicted)
    holder = _follow(before, shared, reading, at_depth)  # the member whose new nodes include the one read out
    node = first_node[holder] + at_depth - shared[holder]
    token = sequences.token_ids[stretched(sequences.starts[members + 1] - predicted, predicted)]
    position, target, entry = _readouts(node, token)

    row_of_node = np.repeat(np.arange(len(rows)), np.diff(first_in_row))
    end -= first_in_row[row_of_node]
    first_prediction = np.concatenate(([0], np.cumsum(predicted)))[first_member]
    first_readout = np.searchsorted(position, first_in_row)
    entry -= np.repeat(TARGETS * first_readout[:-1], np.diff(first_prediction))
    position -= first_in_row[:-1][row_of_node[position]]
    parts = [
        *((values, first_in_row) for values in (token_ids, depth, end)),
        *((values, first_readout) for values in (position, target)),
        *((values, first_prediction) for values in (members[reading], entry)),
    ]
    by_row = [np.split(values.astype(np.int32), bounds[1:-1]) for values, bounds in parts]
    return [TreeLayout(*row) for row in zip(*by_row, strict=True)]


def _nearest_shallower(shared: Longs) -> tuple[Longs, Longs]:
    """For each member, the nearest member before, and after, that takes over fewer nodes."""
    values = shared.tolist()
    before, after = [0] * len(values), [len(values)] * len(values)
    rising: list[int] = []  # members whose `after` is not known yet, with rising values
    for m, kept in enumerate(values):
        while rising and values[rising[-1]] > kept:
            after[rising.pop()] = m
        if rising:
            last = rising[-1]
            before[m] = before[last] if values[last] == kept else last
        rising.append(m)
    return np.array(before), np.array(after)


def _follow(step: Longs, shared: Longs, member: Longs, depth: Longs) -> Longs:
    """Moves from each member by `step` until a member takes over no node as deep as `depth`."""
    member = member.copy()
    moving = np.flatnonzero(shared[member] > depth)
    while len(moving):
        member[moving] = step[member[moving]]
        moving = moving[shared[member[moving]] > depth[moving]]
    return member


def _readouts(node: Longs, token: Ints) -> tuple[Ints, Ints, Ints]:
    """Gathers predictions (node, token) into readouts: position, target and entry of a `TreeLayout`."""
    pairs, pair_of = np.unique((node << 32) | token, return_inverse=True)
    of_node, token_of = (pairs >> 32).astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32)
    new_node = np.diff(of_node, prepend=-1) != 0
    first = np.flatnonzero(new_node)
    rank = np.arange(len(pairs)) - np.repeat(first, np.diff(np.append(first, len(pairs))))  # among the node's tokens
    readout = np.cumsum(rank % TARGETS == 0) - 1
    place = readout * TARGETS + rank % TARGETS
    target = np.zeros((int(readout[-1]) + 1, TARGETS), dtype=np.int32)
    target.reshape(-1)[place] = token_of
    return of_node[rank % TARGETS == 0], target, place[pair_of].astype(np.int32)
