"""Turns a pass into one flat array of int32, to be copied into a bucket's static buffer at once."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from cecompile.workload.decode_schedule import DecodeShape
from cecompile.workload.plan import Bucket, Geometry, Pass, Plan
from cecompile.workload.sequences import Ints, Sequences
from cecompile.workload.tree import TARGETS

TILE = 64  # tokens a side of a block-sparse mask's tiles: small, as question trees are small

Array = TypeVar("Array", bound=Any)


@dataclass(frozen=True, slots=True)
class StagedPass:
    """A pass's input, and the meaning of its output."""

    bucket: int  # index into the plan's buckets
    data: Ints  # (n,) the parts that `fields` names, one after another
    choice: Ints  # (predictions,) the sequence that a predicted token belongs to
    entry: Ints  # (predictions,) the predicted token's index among the readouts' targets, flattened
    target: Ints  # (predictions,) the predicted token
    tokens: int  # slots in use


def fields(bucket: Bucket, blocks: bool) -> dict[str, tuple[int, ...]]:
    """The name and shape of each part of a pass's data, in order.

    token_ids, depth, end: (rows, length), per slot; `end` counts from the row's first slot. A padded slot is its own
    tree. position: (readouts,), counting slots over all rows. target: (readouts, TARGETS). With `blocks`, each row and
    tile of queries has lists of the tiles of keys to look at: `full_*` without hidden pairs, `partial_*` with some, and
    `any_*` both, for masks that hide more.
    """
    slots, tiles = (bucket.rows, bucket.length), bucket.length // TILE
    out: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "depth", "end"), slots)
    out |= {"position": (bucket.readouts,), "target": (bucket.readouts, TARGETS)}
    if blocks:
        for kind in ("partial", "full", "any"):
            out |= {f"{kind}_count": (bucket.rows, tiles), f"{kind}_index": (bucket.rows, tiles, tiles)}
    return out


def views(data: Array, bucket: Bucket, blocks: bool) -> dict[str, Array]:
    """`data` (a flat NumPy array or torch tensor) as its named parts, sharing memory."""
    shapes = fields(bucket, blocks)
    bounds = itertools.pairwise(itertools.accumulate(map(math.prod, shapes.values()), initial=0))
    return {name: data[at:end].reshape(shapes[name]) for name, (at, end) in zip(shapes, bounds, strict=True)}


def data_size(bucket: Bucket, blocks: bool) -> int:
    """The number of int32 values in a pass's data."""
    return sum(map(math.prod, fields(bucket, blocks).values()))


def stage_all(plan: Plan) -> Iterator[StagedPass]:
    """Every pass of the plan, staged when asked for, in order."""
    return (stage(one, plan.buckets[one.bucket], plan.geometry.blocks) for one in plan.passes)


def stage(one: Pass, bucket: Bucket, blocks: bool) -> StagedPass:
    """Pads the pass's rows to the bucket's shape."""
    data = empty_pass(bucket, blocks)
    part = views(data, bucket, blocks)
    for r, layout in enumerate(one.rows):
        for name in ("token_ids", "depth", "end"):
            part[name][r, : len(layout.token_ids)] = getattr(layout, name)
    position = np.concatenate([row.position + r * bucket.length for r, row in enumerate(one.rows)])
    target = np.concatenate([row.target for row in one.rows])
    first_readout = np.cumsum([0] + [len(row.position) for row in one.rows[:-1]])
    entry = np.concatenate([row.entry + at * TARGETS for row, at in zip(one.rows, first_readout, strict=True)])
    part["position"][: len(position)] = position
    part["target"][: len(target)] = target
    if blocks:
        _index_tiles(part)
    choice = np.concatenate([row.choice for row in one.rows])
    tokens = sum(len(row.token_ids) for row in one.rows)
    return StagedPass(one.bucket, data, choice, entry.astype(np.int32), target.reshape(-1)[entry], tokens)


def empty_pass(bucket: Bucket, blocks: bool) -> Ints:
    """The data of an empty pass: every slot is padding, and every readout reads slot 0."""
    data = np.zeros(data_size(bucket, blocks), dtype=np.int32)
    part = views(data, bucket, blocks)
    part["end"][:] = np.arange(1, bucket.length + 1)
    if blocks:
        _index_tiles(part)
    return data


def _index_tiles(part: dict[str, Ints]) -> None:
    """Fills in the tiles of keys that each tile of queries looks at.

    A query tile looks at an earlier or the same key tile iff the subtree of one of the keys reaches into the query
    tile. The key tile is wholly visible iff the subtrees of all its keys reach past the last query.
    """
    end = part["end"].reshape(len(part["end"]), -1, TILE)  # (rows, tiles, TILE)
    tiles = end.shape[1]
    first = np.arange(tiles) * TILE
    farthest, nearest = end.max(axis=2), end.min(axis=2)
    before = np.tri(tiles, dtype=bool)  # [query tile, key tile]: the key tile is not after the query tile
    some = before & (farthest[:, None, :] > first[None, :, None])
    full = np.tri(tiles, k=-1, dtype=bool) & (nearest[:, None, :] >= first[None, :, None] + TILE)
    for name, chosen in (("partial", some & ~full), ("full", full), ("any", some)):
        part[f"{name}_count"][:] = chosen.sum(axis=2)
        part[f"{name}_index"][:] = np.argsort(~chosen, axis=2, kind="stable")


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """The shapes to warm up, and the passes to run.

    Attributes:
        geometry, buckets, decoding: the plan's.
        sequences, staged: the work; warm-up checks a few of the sequences. None and empty while unknown.
    """

    geometry: Geometry
    buckets: tuple[Bucket, ...]
    decoding: DecodeShape | None = None
    sequences: Sequences | None = None
    staged: Sequence[StagedPass] = ()

    @classmethod
    def for_plan(cls, plan: Plan, sequences: Sequences) -> "StagedPlan":
        """The plan with all its passes staged."""
        return cls(plan.geometry, plan.buckets, plan.decoding, sequences, list(stage_all(plan)))

    @property
    def compiled(self) -> tuple[Bucket | DecodeShape, ...]:
        """The shapes to compile."""
        return self.buckets if self.decoding is None else (*self.buckets, self.decoding)

    @property
    def steps(self) -> int:
        """The number of compilations: one per bucket, and one per size of a decoding step."""
        return len(self.buckets) + (0 if self.decoding is None else len(self.decoding.step_tokens))
