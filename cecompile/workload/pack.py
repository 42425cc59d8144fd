"""Filling rows: which trees share a row, so that little is padded and little is repeated.

Items are taken in sorted order, so that neighbours share prefixes; when the next one does not fit, the gap is closed
with the largest unplaced item that does. Each step looks up one bit set, so packing is linear in the number of items.
"""

from dataclasses import dataclass

import numpy as np

from cecompile.workload.order import Order
from cecompile.workload.sequences import Longs, Sequences

MIN_SHARED = 4  # questions sharing fewer tokens stay separate trees: a shared root makes every token look back at it


@dataclass(frozen=True, slots=True)
class Items:
    """What is placed as a whole: a question, or a part of one whose tree is larger than a row.

    Attributes:
        start: (m + 1,) each item is the places [start[k], start[k + 1]) of the order.
        size: (m,) nodes of the item's own tree.
        shared: (m,) nodes it would take over from the item before, if both are in one row side by side.
    """

    start: Longs
    size: Longs
    shared: Longs


def split_items(sequences: Sequences, order: Order, capacity: int) -> Items:
    """Cuts the order into items of at most `capacity` nodes, between questions and, where it must be, inside them."""
    questions = sequences.questions[order.sequence]
    lengths = sequences.input_lengths[order.sequence]
    boundary = np.concatenate(([True], questions[1:] != questions[:-1]))
    grown = np.where(boundary, lengths, lengths - order.shared)
    starts = np.flatnonzero(boundary)
    if np.add.reduceat(grown, starts).max() > capacity:
        starts = _split_large(lengths, order.shared, boundary, capacity)
        grown = lengths - order.shared
        grown[starts] = lengths[starts]
    bounds = np.append(starts, len(lengths))

    inner = order.shared.copy()  # shared prefix with the sequence before, inside an item
    inner[starts] = lengths[starts]
    trunk = np.minimum.reduceat(np.minimum(inner, lengths), starts)
    shared = np.minimum(order.shared[starts], trunk)
    shared[1:] = np.minimum(shared[1:], trunk[:-1])
    shared[0] = 0
    return Items(bounds, np.add.reduceat(grown, starts), np.where(shared < MIN_SHARED, 0, shared))


def _split_large(lengths: Longs, shared: Longs, boundary: np.ndarray, capacity: int) -> Longs:
    starts, size = [], 0
    for place, (length, kept, first) in enumerate(
        zip(lengths.tolist(), shared.tolist(), boundary.tolist(), strict=True)
    ):
        if first or size + length - kept > capacity:
            starts.append(place)
            size = length
        else:
            size += length - kept
    return np.array(starts, dtype=np.int64)


def fill_rows(items: Items, capacity: int) -> list[list[int]]:
    """Assigns every item to a row.

    Args:
        items: none larger than `capacity`.
        capacity: nodes a row holds.

    Returns:
        Per row its items in ascending order. A row whose neighbours in that order share prefixes holds at most
        `capacity` nodes after merging.
    """
    size, shared = items.size.tolist(), items.shared.tolist()
    common = min(shared[1:], default=0)  # what any two items share, whichever row they meet in
    pool = _Pool(items.size - common)
    walk = _large_groups_first(items)
    rows: list[list[int]] = []
    cursor = 0
    while cursor < len(walk):
        row: list[int] = []
        used, link = 0, 0  # link: what the item at the cursor shares with the last one taken before it
        while cursor < len(walk):
            item = walk[cursor]
            link = min(link, shared[item])
            if not pool.placed[item]:
                cost = size[item] - link
                if used + cost > capacity:
                    break
                row.append(item)
                pool.placed[item] = True
                used += cost
                link = capacity
            cursor += 1
        while (filler := pool.take(capacity - used)) is not None:
            row.append(filler)
            used += size[filler] - common
        if row:
            rows.append(sorted(row))
    return rows


def _large_groups_first(items: Items) -> list[int]:
    """The items, group by group of those that share prefixes, so that small items are left to close rows with."""
    starts = np.flatnonzero(items.shared == 0)
    counts = np.diff(np.append(starts, len(items.size)))
    mean = np.add.reduceat(items.size, starts) / counts
    group_rank = np.argsort(np.argsort(-mean, kind="stable"), kind="stable")
    return np.argsort(np.repeat(group_rank, counts), kind="stable").tolist()


class _Pool:
    """Unplaced items by size; `take` finds the largest that fits."""

    def __init__(self, size: Longs) -> None:
        self.placed = [False] * len(size)
        self._by_size: dict[int, list[int]] = {}
        for item, s in enumerate(size.tolist()):
            self._by_size.setdefault(s, []).append(item)
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
