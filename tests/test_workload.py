"""Token trees and packing: nothing lost, nothing doubled, masks equal to ancestry, rows within their size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import random_questions

from cecompile.workload.order import sort_sequences
from cecompile.workload.plan import (
    BLOCK,
    ENOUGH_FILL,
    MAX_BUCKETS,
    SPARE,
    Geometry,
    choose_geometry,
    every_bucket,
    make_plan,
)
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import TILE, stage_all, views
from cecompile.workload.tree import TARGETS

token = st.integers(0, 3)  # few token kinds, so that prefixes collide


@st.composite
def datasets(draw) -> Sequences:
    """Questions of 1 to 5 choices over a tiny alphabet, some with long shared contexts."""
    shared = draw(st.lists(token, max_size=20))
    parts, readouts, owners = [], [], []
    for q in range(draw(st.integers(1, 12))):
        context = draw(st.sampled_from([[], shared])) + draw(st.lists(token, min_size=1, max_size=30))
        choices = draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=5))
        parts += [context + choice for choice in choices]
        readouts += map(len, choices)
        owners += [q] * len(choices)
    return Sequences.of(parts, readouts, owners)


def geometry_of(sequences: Sequences, blocks: bool, tokens: int) -> Geometry:
    longest = int(sequences.input_lengths.max())
    return choose_geometry(longest, tokens_per_bucket=tokens, blocks=blocks, readout_chunk=4)


def geometries(sequences: Sequences):
    for blocks, tokens in ((True, 256), (True, 1024), (False, 128), (False, 512)):
        yield geometry_of(sequences, blocks, tokens)


def staged_with_views(sequences: Sequences, geometry: Geometry):
    plan = make_plan(sequences, geometry)
    for one in stage_all(plan):
        bucket = plan.buckets[one.bucket]
        yield one, bucket, views(one.data, bucket, plan.geometry.blocks)


@settings(max_examples=150)
@given(datasets())
def test_every_token_of_every_choice_is_once_on_its_path(sequences):
    for geometry in geometries(sequences):
        seen = np.zeros(len(sequences), dtype=int)
        for one, bucket, part in staged_with_views(sequences, geometry):
            token_ids, depth, end = (part[n].reshape(-1) for n in ("token_ids", "depth", "end"))
            for choice in np.unique(one.choice):
                of_choice = np.flatnonzero(one.choice == choice)
                assert len(of_choice) == sequences.predicted[choice]
                assert one.target[of_choice].tolist() == sequences.targets(choice).tolist()
                assert part["target"].reshape(-1)[one.entry[of_choice]].tolist() == one.target[of_choice].tolist()
                node = part["position"][one.entry[of_choice] // TARGETS]
                leaf = node[-1]
                row_start = leaf // bucket.length * bucket.length
                within = np.arange(row_start, leaf + 1)
                path = within[end[within] > leaf - row_start]  # the keys visible to the leaf
                assert token_ids[path].tolist() == sequences.inputs(choice).tolist()
                assert depth[path].tolist() == list(range(len(path)))
                assert node.tolist() == path[-len(of_choice) :].tolist()
                seen[choice] += 1
        assert seen.tolist() == [1] * len(sequences)


@settings(max_examples=60)
@given(datasets())
def test_mask_is_the_ancestor_relation(sequences):
    for _, bucket, part in staged_with_views(sequences, geometry_of(sequences, False, 256)):
        for depth, end in zip(part["depth"], part["end"], strict=True):
            ancestors: list[set[int]] = []  # from the depths alone: the parent is the last node one level up
            last_at_depth: dict[int, int] = {}
            for slot, d in enumerate(depth.tolist()):
                parent = last_at_depth.get(d - 1)
                ancestors.append({slot} | (ancestors[parent] if d > 0 else set()))
                last_at_depth[d] = slot
            slot = np.arange(bucket.length)
            visible = (slot[None, :] <= slot[:, None]) & (slot[:, None] < end[None, :])
            assert [set(np.flatnonzero(row).tolist()) for row in visible] == ancestors


@settings(max_examples=60)
@given(datasets())
def test_tile_index_covers_what_is_visible_and_full_tiles_hide_nothing(sequences):
    for _, bucket, part in staged_with_views(sequences, geometry_of(sequences, True, 640)):
        slot, tiles = np.arange(bucket.length), bucket.length // TILE
        visible = (slot[None, :] <= slot[:, None]) & (slot[:, None] < part["end"][0][None, :])
        tile = visible.reshape(tiles, TILE, tiles, TILE).transpose(0, 2, 1, 3).reshape(tiles, tiles, -1)
        for q in range(tiles):
            names = ("partial", "full")
            partial, full = (set(part[f"{n}_index"][0, q, : part[f"{n}_count"][0, q]].tolist()) for n in names)
            assert not partial & full
            assert partial | full == set(np.flatnonzero(tile[q].any(-1)).tolist())
            assert full == set(np.flatnonzero(tile[q].all(-1)).tolist())


@settings(max_examples=60)
@given(datasets())
def test_counts_are_what_a_set_of_prefixes_says(sequences):
    inputs = [tuple(sequences.inputs(i)) for i in range(len(sequences))]
    prefixes = {tokens[:n] for tokens in inputs for n in range(1, len(tokens) + 1)}
    for geometry in geometries(sequences):
        plan = make_plan(sequences, geometry)
        assert plan.prefix_tree_tokens == len(prefixes)
        assert plan.unshared_tokens == sequences.input_lengths.sum()
        assert len(prefixes) <= plan.useful_tokens <= plan.unshared_tokens
        assert plan.question_tree_tokens <= plan.unshared_tokens
        assert plan.useful_tokens == sum(len(row.token_ids) for one in plan.passes for row in one.rows)
        assert plan.slots >= plan.useful_tokens
        assert len(plan.buckets) <= MAX_BUCKETS


@settings(max_examples=40)
@given(datasets())
def test_plans_are_deterministic(sequences):
    for geometry in geometries(sequences):
        first, second = (list(stage_all(make_plan(sequences, geometry))) for _ in range(2))
        assert all((a.data == b.data).all() and a.bucket == b.bucket for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("prefix", [0, 600])
def test_rows_are_nearly_full(prefix):
    sequences = random_questions(1500, 0, (10, 150), prefix)
    plan = make_plan(sequences, Geometry(rows=1, length=8192, readout_chunk=256, blocks=True))
    assert plan.slots <= 1.03 * plan.useful_tokens
    assert plan.useful_tokens <= plan.prefix_tree_tokens + sum(len(p.rows) for p in plan.passes) * prefix + 1500 * 4


def test_a_question_larger_than_a_row_is_split_by_branches():
    sequences = random_questions(1, 1, (60, 61))
    parts = np.split(sequences.token_ids, sequences.starts[1:-1]) * 50
    many = Sequences.of(parts, np.tile(sequences.predicted, 50), [0] * 200)
    many.token_ids[:] = np.random.default_rng(0).integers(0, 1000, len(many.token_ids))
    plan = make_plan(many, Geometry(rows=4, length=128, readout_chunk=1, blocks=False))
    assert all(len(row.token_ids) <= 128 for p in plan.passes for row in p.rows)
    members = [np.unique(row.choice) for p in plan.passes for row in p.rows]
    assert sorted(np.concatenate(members).tolist()) == list(range(200))


def test_siblings_are_read_out_together():
    """Six one-token choices after one context: two readouts of its last node, not six."""
    context, choices = [7, 8, 9], [1, 2, 3, 4, 5, 2]
    sequences = Sequences.of([[*context, choice] for choice in choices], [1] * 6, [0] * 6)
    plan = make_plan(sequences, Geometry(rows=1, length=128, readout_chunk=1, blocks=False))
    (row,) = plan.passes[0].rows
    assert row.token_ids.tolist() == context
    assert row.position.tolist() == [2, 2]
    assert row.target.tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]


def shapes(plan) -> list[tuple[int, int]]:
    return [bucket.shape for bucket in plan.buckets]


def test_few_questions_use_a_small_bucket():
    sequences = random_questions(1, 0, (10, 11))
    geometry = Geometry(rows=8, length=1024, readout_chunk=64, blocks=False)
    assert shapes(make_plan(sequences, geometry, tight=False)) == [(1, 1024)]
    assert shapes(make_plan(sequences, geometry)) == [(1, BLOCK)]


@settings(max_examples=40)
@given(datasets())
def test_tight_buckets_are_as_full_as_whole_blocks_allow_and_no_more_in_number(sequences):
    for geometry in geometries(sequences):
        loose, plan = (make_plan(sequences, geometry, tight=tight) for tight in (False, True))
        assert plan.slots <= loose.slots
        assert len(plan.buckets) <= len(loose.buckets)
        assert plan.useful_tokens == loose.useful_tokens
        assert all(bucket.length % BLOCK == 0 for bucket in plan.buckets)
        if loose.slots <= ENOUGH_FILL * loose.useful_tokens:
            assert shapes(plan) == shapes(loose)
            continue
        for i, bucket in enumerate(plan.buckets):
            passes = [one.rows for one in plan.passes if one.bucket == i]
            fullest = max(len(row.token_ids) for rows in passes for row in rows)
            assert max(map(len, passes)) == bucket.rows
            assert bucket.length - BLOCK < fullest <= bucket.length


@settings(max_examples=40)
@given(datasets(), st.data())
def test_compiled_shapes_are_taken_where_they_are_about_as_good(sequences, data):
    for geometry in geometries(sequences):
        loose, tight = make_plan(sequences, geometry, tight=False), make_plan(sequences, geometry)
        assert shapes(make_plan(sequences, geometry, compiled=shapes(loose))) in (shapes(loose), shapes(tight))
        assert shapes(make_plan(sequences, geometry, compiled=shapes(tight))) == shapes(tight)
        kinds = [b.shape for b in (*loose.buckets, *tight.buckets, *every_bucket(geometry))]
        compiled = data.draw(st.sets(st.sampled_from(kinds)))
        plan = make_plan(sequences, geometry, compiled=compiled)
        assert plan.slots <= loose.slots
        assert len(plan.buckets) <= len(loose.buckets)
        if not set(shapes(loose)) & compiled:
            assert plan.slots <= SPARE * tight.slots


def test_a_shape_that_is_compiled_saves_compiling_another():
    """A row of 18 blocks in buckets of 64, 32, ...: a compiled shape up to a tenth larger is taken, or that of 32."""
    one = Sequences.of([np.arange(18 * BLOCK + 1)], [1], [0])
    geometry = Geometry(rows=1, length=64 * BLOCK, readout_chunk=1, blocks=True)
    for blocks, taken in {17: 18, 18: 18, 19: 19, 20: 18, 32: 32, 64: 18}.items():
        plan = make_plan(one, geometry, compiled=[(1, blocks * BLOCK)])
        assert shapes(plan) == [(1, taken * BLOCK)], blocks


@settings(max_examples=30)
@given(datasets())
def test_buckets_for_data_not_yet_seen_are_the_same_whatever_the_data(sequences):
    for geometry in geometries(sequences):
        plan = make_plan(sequences, geometry, all_buckets=True)
        assert shapes(plan) == [bucket.shape for bucket in every_bucket(geometry)]
        assert plan.slots <= make_plan(sequences, geometry, tight=False).slots


@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("all_buckets", [False, True])
def test_thirty_short_prompts_fill_nine_tenths_of_their_slots(tokens, all_buckets):
    """Trees as large as the contest's public rows are: a common start of 45 tokens, 2,790 tokens in all."""
    random = np.random.default_rng(0)
    start = random.integers(0, 1000, 45)
    parts = [[*start, *random.integers(0, 1000, 92)] for _ in range(30)]
    sequences = Sequences.of(parts, [1] * 30, range(30))
    geometry = choose_geometry(136, tokens_per_bucket=tokens, blocks=True, readout_chunk=64)
    plan = make_plan(sequences, geometry, all_buckets=all_buckets)
    assert plan.useful_tokens >= 0.9 * plan.slots


def test_a_large_set_keeps_the_shapes_of_its_geometry():
    sequences = random_questions(600, 5, (10, 150))
    geometry = Geometry(rows=1, length=2048, readout_chunk=256, blocks=True)
    plan = make_plan(sequences, geometry)
    assert shapes(plan) == shapes(make_plan(sequences, geometry, tight=False))
    assert set(shapes(plan)) <= {bucket.shape for bucket in every_bucket(geometry)}


def test_sorting_puts_each_questions_sequences_side_by_side():
    sequences = random_questions(50, 3, (1, 4))
    owner = sequences.questions[sort_sequences(sequences).sequence]
    assert (np.diff(owner) != 0).sum() == 49
