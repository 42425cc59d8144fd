"""The plan: which sequences run together, in which fixed shapes."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.order import Order, sort_sequences
from cecompile.workload.pack import MIN_SHARED, fill_rows, split_items
from cecompile.workload.sequences import Longs, Sequences, shared_prefixes, stretched
from cecompile.workload.tree import TreeLayout, lay_out

BLOCK = 128  # row lengths are multiples of this
DENSE_ROW = (512, 1024)  # shortest and longest row of dense attention, where the sequences leave the choice
MAX_BUCKETS = 4
ROWS_AT_ONCE = 512  # rows that are laid out together; bounds the memory taken besides the result
ROOM = 1.25  # readouts of buckets for later windows, relative to the first window's
ENOUGH_FILL = 1.03  # slots per useful token below which a further bucket shape is not worth its compilation
FEW_PASSES = 8  # up to this many are also packed in shorter rows, for the least padding in shapes that are given
SPARE = 1.1  # slots of a compiled shape, relative to a tight one, up to which the compiled one is taken

Shape = tuple[int, int]  # rows, and length in tokens


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape to plan for: the largest bucket has `rows` rows of `length` tokens."""

    rows: int
    length: int
    readout_chunk: int  # readouts are padded to a multiple of this
    blocks: bool  # whether passes carry the tile index of a block-sparse mask


@dataclass(frozen=True, slots=True)
class Bucket:
    """A fixed shape: `rows` x `length` tokens with `readouts` readouts, compiled and captured once."""

    rows: int
    length: int
    readouts: int

    @property
    def slots(self) -> int:
        return self.rows * self.length

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.length


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of a bucket, of which the first rows are in use."""

    bucket: int
    rows: tuple[TreeLayout, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All passes, and the counts that measure their quality."""

    geometry: Geometry
    buckets: tuple[Bucket, ...]  # the shapes used, largest first
    passes: tuple[Pass, ...]  # in the order in which they run, largest bucket first
    useful_tokens: int  # nodes in all rows
    unshared_tokens: int  # input tokens of all sequences, without sharing and padding
    question_tree_tokens: int  # nodes of a prefix tree per question
    prefix_tree_tokens: int  # nodes of one prefix tree over the whole dataset, the floor
    decoding: DecodeShape | None = None  # for answers that leave their tree; None where nothing is answered

    @property
    def compiled(self) -> tuple[Bucket | DecodeShape, ...]:
        """The shapes to compile for this plan."""
        return self.buckets if self.decoding is None else (*self.buckets, self.decoding)

    @property
    def slots(self) -> int:
        """The number of token slots in all passes, used or padded."""
        return sum(self.buckets[p.bucket].slots for p in self.passes)

    def runs(self, bucket: int) -> int:
        """The number of passes that use a bucket."""
        return sum(p.bucket == bucket for p in self.passes)

    def useful_tokens_of(self, bucket: int) -> int:
        """The number of nodes in the rows of a bucket's passes."""
        return sum(len(row.token_ids) for p in self.passes if p.bucket == bucket for row in p.rows)


def choose_geometry(
    longest: int, *, tokens_per_bucket: int, blocks: bool, readout_chunk: int, shared: int = 0, key_cost: float = 0.0
) -> Geometry:
    """The largest bucket's shape.

    Args:
        longest: the longest sequence's number of inputs; a row always holds as many.
        tokens_per_bucket: the approximate number of a bucket's slots.
        blocks: attention skips empty tiles, so one row as long as the bucket packs best. Without, attention is dense:
            longer rows cost more, shorter rows share less. Then a row is an eighth of the bucket, within DENSE_ROW, or
            longer if a longer row costs less per token.
        shared: tokens that neighbouring questions typically share; every row computes them once.
        key_cost: the cost of a token's attention to one more key, relative to all other cost of a token.
    """
    least = -(-longest // BLOCK) * BLOCK
    budget = max(BLOCK, tokens_per_bucket // BLOCK * BLOCK)
    length = max(least, budget)
    if not blocks:
        dense = min(max(budget // 8 // BLOCK * BLOCK, DENSE_ROW[0]), DENSE_ROW[1], budget)
        longer = range(max(least, dense), length + 1, BLOCK)
        length = min(longer, key=lambda n: n / max(1, n - shared) * (1 + key_cost * n))
    return Geometry(max(1, budget // length), length, readout_chunk, blocks)


def make_plan(
    sequences: Sequences, geometry: Geometry, *, all_buckets: bool = False, order: Order | None = None,
    buckets: tuple[Bucket, ...] = (), boundary: int | None = None, tight: bool = True, compiled: Collection[Shape] = (),
) -> Plan:  # fmt: skip
    """Sorts, merges and packs all sequences. Deterministic; near n log n in the number of tokens.

    Args:
        sequences: at least one.
        order: the sequences' order, where known already.
        all_buckets: include all buckets of `every_bucket`, used or not, to warm up for data not yet seen.
        buckets: the buckets of an earlier plan of this geometry. The plan includes all of them, with more readouts
            where needed, and adds a shape only for rows that are longer than all buckets'.
        boundary: sequences of more inputs than this share no tokens and no pass with the others.
        tight: where padding would not be small, make shapes no larger than their passes need. `all_buckets` and
            `buckets` rule this out: their shapes are for other data too.
        compiled: shapes that are compiled already; a tight shape is not compiled where one of these is about as good.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    if sequences.input_lengths.max() > geometry.length:
        raise ValueError(f"a sequence of {sequences.input_lengths.max()} tokens in rows of {geometry.length}")
    order = order or sort_sequences(sequences)
    shaped: Shaped = []
    for side in [order] if boundary is None else order.sides(sequences, boundary):
        shaped += _shaped(sequences, side, geometry, buckets, all_buckets)
    if tight and not all_buckets and not buckets:
        shaped = _tightened(shaped, compiled)
    readouts = {b.shape: b.readouts for b in (every_bucket(geometry) if all_buckets else buckets)}
    for shape, part in shaped:
        readouts[shape] = max(readouts.get(shape, 1), sum(len(row.position) for row in part))
    shapes = sorted(readouts, key=lambda s: (-s[0] * s[1], s))
    buckets = tuple(Bucket(*shape, _padded(readouts[shape], geometry)) for shape in shapes)
    passes = tuple(sorted((Pass(shapes.index(shape), part) for shape, part in shaped), key=lambda p: p.bucket))
    same_question = np.diff(sequences.questions[order.sequence], prepend=-1) == 0
    useful = sum(len(row.token_ids) for one in passes for row in one.rows)
    unshared = int(sequences.input_lengths.sum())
    in_question_trees = unshared - int(order.shared[same_question].sum())
    return Plan(geometry, buckets, passes, useful, unshared, in_question_trees, order.prefix_tree_tokens)


Shaped = list[tuple[Shape, tuple[TreeLayout, ...]]]  # the shape and the rows in use of each pass


def _shaped(
    sequences: Sequences, order: Order, geometry: Geometry, buckets: tuple[Bucket, ...], all_buckets: bool
) -> Shaped:
    """The passes over an order's sequences. With `all_buckets`, few passes are packed in rows of each bucket's length.

    A long row that is half empty then becomes two shorter rows, where these have less padding.
    """
    best = _cover(_packed(sequences, order, geometry.length), geometry, buckets)
    if not all_buckets or len(best) > FEW_PASSES or _slots(best) <= ENOUGH_FILL * _useful(best):
        return best
    longest = int(sequences.input_lengths[order.sequence].max())
    shorter = sorted({length for _, length in ladder(geometry) if longest <= length < geometry.length})
    packings = [best, *(_cover(_packed(sequences, order, length), geometry, buckets) for length in shorter)]
    return min(packings, key=lambda one: (_slots(one), len(one)))


def _packed(sequences: Sequences, order: Order, length: int) -> list[TreeLayout]:
    """Rows of at most `length` tokens over an order's sequences, fullest first."""
    items = split_items(sequences, order, length)
    filled = fill_rows(items, length)
    parts = (filled[at : at + ROWS_AT_ONCE] for at in range(0, len(filled), ROWS_AT_ONCE))
    rows = [row for part in parts for row in _rows(sequences, order, items.start, part)]
    return sorted(rows, key=lambda row: -len(row.token_ids))


def _tightened(shaped: Shaped, compiled: Collection[Shape]) -> Shaped:
    """The passes in shapes that hold no more than their fullest pass needs; unchanged where padding is small.

    There are never more shapes nor more slots than before.
    """
    if _slots(shaped) <= ENOUGH_FILL * _useful(shaped):
        return shaped
    tight: dict[Shape, Shape] = {}
    for shape in {shape for shape, _ in shaped}:
        parts = [part for of, part in shaped if of == shape]
        rows, fullest = max(map(len, parts)), max(len(row.token_ids) for part in parts for row in part)
        length = -(-fullest // BLOCK) * BLOCK
        most = min(SPARE * rows * length, shape[0] * shape[1])
        known = [c for c in compiled if rows <= c[0] and length <= c[1] and (c == shape or c[0] * c[1] <= most)]
        tight[shape] = min(known, key=lambda c: (c[0] * c[1], c), default=(rows, length))
    return [(tight[shape], part) for shape, part in shaped]


def _slots(shaped: Shaped) -> int:
    return sum(rows * length for (rows, length), _ in shaped)


def _useful(shaped: Shaped) -> int:
    return sum(len(row.token_ids) for _, part in shaped for row in part)


def _rows(sequences: Sequences, order: Order, start: Longs, filled: list[list[int]]) -> list[TreeLayout]:
    """Lays out rows of trees over each row's items. Items that share fewer than MIN_SHARED tokens stay apart."""
    items = np.concatenate([np.array(row, dtype=np.int64) for row in filled])
    sizes = start[items + 1] - start[items]
    places = stretched(start[items], sizes)
    members, shared = order.sequence[places], order.shared[places]
    heads = np.cumsum(sizes) - sizes  # each item's first place
    shared[heads[1:]] = shared_prefixes(sequences, members[heads[1:] - 1], members[heads[1:]])
    shared[heads] = np.where(shared[heads] < MIN_SHARED, 0, shared[heads])
    first = heads[np.cumsum([0] + [len(row) for row in filled[:-1]])]
    shared[first] = 0
    return lay_out(sequences, members, shared, first)


def _cover(rows: list[TreeLayout], geometry: Geometry, buckets: tuple[Bucket, ...]) -> Shaped:
    """Passes over rows, fullest first, in the shapes of `buckets`; for longer rows, in the geometry's shape too.

    Without `buckets`, the passes have the fewest shapes whose padding is small, else the shapes of least padding.
    """
    if buckets:
        shapes = [b.shape for b in buckets]
        if len(rows[0].token_ids) > max(length for _, length in shapes):
            shapes.insert(0, (geometry.rows, geometry.length))
        return _cover_with(rows, shapes)
    useful = sum(len(r.token_ids) for r in rows)
    shapes = ladder(geometry)
    candidates = [_cover_with(rows, shapes[: n + 1]) for n in range(len(shapes))]
    slots = [_slots(c) for c in candidates]
    good_enough = [c for c, s in zip(candidates, slots, strict=True) if s <= ENOUGH_FILL * useful]
    if good_enough:
        return min(good_enough, key=lambda c: len({shape for shape, _ in c}))
    return candidates[slots.index(min(slots))]


def with_room(plan: Plan, known: tuple[Bucket, ...]) -> Plan:
    """The plan with more readouts in buckets not `known` already, so that a later plan can use the same buckets."""
    most = {b.shape: b.readouts for b in every_bucket(plan.geometry)}

    def roomy(bucket: Bucket) -> Bucket:
        wanted = min(_padded(int(ROOM * bucket.readouts), plan.geometry), most[bucket.shape])
        return replace(bucket, readouts=max(bucket.readouts, wanted))

    return replace(plan, buckets=tuple(b if b in known else roomy(b) for b in plan.buckets))


def ladder(geometry: Geometry) -> list[Shape]:
    """The shapes that a plan of this geometry starts from: the bucket, halved by rows, then by length."""
    out = [(geometry.rows, geometry.length)]
    while len(out) < MAX_BUCKETS:
        height, length = out[-1]
        smaller = (height // 2, length) if height > 1 else (1, length // 2 // BLOCK * BLOCK)
        if 0 in smaller:
            break
        out.append(smaller)
    return out


def every_bucket(geometry: Geometry) -> tuple[Bucket, ...]:
    """All buckets that a plan for data not yet seen may use, with a readout for every slot."""
    return tuple(Bucket(r, n, _padded(r * n, geometry)) for r, n in ladder(geometry))


def _padded(readouts: int, geometry: Geometry) -> int:
    return -(-readouts // geometry.readout_chunk) * geometry.readout_chunk


def _cover_with(rows: list[TreeLayout], shapes: list[Shape]) -> Shaped:
    """The passes of least padding, then the fewest, by dynamic programming over rows sorted fullest first."""
    best = [(0, 0, shapes[0])] * (len(rows) + 1)  # of rows[at:]: slots, passes, and the first pass's shape
    for at in reversed(range(len(rows))):
        options = []
        for height, length in shapes:
            if length >= len(rows[at].token_ids):
                slots, passes, _ = best[min(at + height, len(rows))]
                options.append((height * length + slots, 1 + passes, (height, length)))
        best[at] = min(options)
    out: Shaped = []
    at = 0
    while at < len(rows):
        shape = best[at][2]
        out.append((shape, tuple(rows[at : at + shape[0]])))
        at += shape[0]
    return out
