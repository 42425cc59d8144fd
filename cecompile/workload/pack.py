"""Fills rows with trees, with little padding and few repeated tokens.

Items are placed in sorted order, so that neighbours share prefixes. When the next item does not fit, the largest
unplaced items that fit close the gap. Each step looks up one bit set, so packing is linear in the number of items.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from cecompile.workload.order import Order
from cecompile.workload.sequences import Longs, Sequences

MIN_SHARED = 4  # questions sharing fewer tokens stay separate trees: all tokens of a tree look back at its root


@dataclass(frozen=True, slots=True)
class Items:
    """Units of packing: a question, or a part of a question whose tree is larger than a row."""

    start: Longs  # (m + 1,) item k has the places [start[k], start[k + 1]) of the order
    size: Longs  # (m,) nodes of the item's own tree
    shared: Longs  # (m,) nodes that the item takes over from the item before, if both are neighbours in a row


def split_items(sequences: Sequences, order: Order, capacity: int) -> Items:
    """Cuts the order into items of at most `capacity` nodes: between questions, and inside larger questions."""
    questions = sequences.questions[order.sequence]
    lengths = sequences.input_lengths[order.sequence]
    boundary = np.diff(questions, prepend=-1) != 0
    grown = np.where(boundary, lengths, lengths - order.shared)
    starts = np.flatnonzero(boundary)
    if np.add.reduceat(grown, starts).max() > capacity:
        cuts, size = [], 0
        new = zip(lengths.tolist(), (lengths - order.shared).tolist(), boundary.tolist(), strict=True)
        for place, (length, added, first) in enumerate(new):
            size += added
            if first or size > capacity:
                cuts.append(place)
                size = length
        starts = np.array(cuts, dtype=np.int64)
        grown = lengths - order.shared
        grown[starts] = lengths[starts]
    inner = order.shared.copy()  # shared prefix with the sequence before, inside an item
    inner[starts] = lengths[starts]
    trunk = np.minimum.reduceat(np.minimum(inner, lengths), starts)
    shared = np.minimum(order.shared[starts], trunk)
    shared[1:] = np.minimum(shared[1:], trunk[:-1])
    shared[0] = 0
    shared[shared < MIN_SHARED] = 0
    return Items(np.append(starts, len(lengths)), np.add.reduceat(grown, starts), shared)


def fill_rows(items: Items, capacity: int) -> list[list[int]]:
    """Assigns every item, none larger than `capacity`, to a row of at most `capacity` nodes after merging.

    Returns each row's items in ascending order, in which neighbours share prefixes.
    """
    size, shared = items.size.tolist(), items.shared.tolist()
    common = min(shared[1:], default=0)  # nodes that any two items share, in whichever row they meet
    pool = _Pool(items.size - common)
    walk = _large_groups_first(items).tolist()
    rows: list[list[int]] = []
    cursor = 0
    while cursor < len(walk):
        row: list[int] = []
        used, link = 0, 0  # link: nodes that the item at the cursor shares with the item taken last
        while cursor < len(walk):
            item = walk[cursor]
            link = min(link, shared[item])
            if not pool.placed[item]:
                if used + size[item] - link > capacity:
                    break
                row.append(item)
                pool.placed[item] = True
                used, link = used + size[item] - link, capacity
            cursor += 1
        while (filler := pool.take(capacity - used)) is not None:
            row.append(filler)
            used += size[filler] - common
        if row:
            rows.append(sorted(row))
    return rows


def _large_groups_first(items: Items) -> Longs:
    """The items in groups that share prefixes, large items first, so that small items are left to close rows."""
    starts = np.flatnonzero(items.shared == 0)
    counts = np.diff(np.append(starts, len(items.size)))
    mean = np.add.reduceat(items.size, starts) / counts
    group_rank = np.argsort(np.argsort(-mean, kind="stable"), kind="stable")
    return np.argsort(np.repeat(group_rank, counts), kind="stable")


class _Pool:
    """Unplaced items by size; `take` finds the largest that fits."""

    def __init__(self, size: Longs) -> None:
        self.placed = [False] * len(size)
        self._by_size: dict[int, list[int]] = defaultdict(list)
        for item, s in enumerate(size.tolist()):
            self._by_size[s].append(item)
        self._sizes = sum(1 << s for s in self._by_size)  # bit s: some item of size s may be left

    def take(self, room: int) -> int | None:
        """The largest unplaced item of at most `room` nodes, now placed; the last in order among equals."""
        while fitting := self._sizes & ((1 << (room + 1)) - 1):
            s = fitting.bit_length() - 1
            stack = self._by_size[s]
            while stack:
                item = stack.pop()
                if not self.placed[item]:
                    self.placed[item] = True
                    return item
            self._sizes &= ~(1 << s)
        return None
