"""Sliding windows at the border: a window as long as a row hides nothing, and one token less hides a pair."""

import numpy as np
import pytest
import torch
from support.models import VOCABULARY, tiny_model
from support.passes import assert_scored_as_stock, score

from cecompile.engine.attention import TreeMasks
from cecompile.engine.decode import _StepMasks
from cecompile.workload.plan import Bucket
from cecompile.workload.sequences import Sequences
from cecompile.workload.stage import empty_pass, views

LENGTH = 256  # of a row that one path fills: its last token is 255 tokens from its first
WINDOWS = {"as long as the row": LENGTH, "a token shorter": LENGTH - 1}
ATTENTIONS = [pytest.param("flex", marks=pytest.mark.compiles), "sdpa"]


def path() -> Sequences:
    tokens = np.random.default_rng(4).integers(3, VOCABULARY, LENGTH + 1)
    return Sequences.of([tokens], predicted=[LENGTH], questions=[0])


def masks(blocks: bool, length: int = LENGTH) -> TreeMasks:
    """The masks of a bucket whose one row is a single path, with a tile index if `blocks`."""
    bucket = Bucket(1, length, 1)
    part = views(torch.from_numpy(empty_pass(bucket, blocks)), bucket, blocks)
    part["depth"][0] = torch.arange(length)
    part["end"][0] = length
    return TreeMasks(part)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["phi3", "mistral"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_row_that_fills_its_bucket_scores_as_the_stock_model(kind, window, attention):
    model = tiny_model(kind, hidden_size=64, sliding_window=window, max_position_embeddings=512)
    assert_scored_as_stock(model, path(), attention, tokens=LENGTH)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", ["phi3", "mistral"])
def test_only_a_window_shorter_than_the_row_changes_a_byte(kind, attention):
    how = {"hidden_size": 64, "max_position_embeddings": 512}
    without, long, short = (
        score(tiny_model(kind, sliding_window=window, **how), path(), attention, tokens=LENGTH)[0]
        for window in (None, *WINDOWS.values())
    )
    assert long.tobytes() == without.tobytes()
    assert short.tobytes() != without.tobytes()


def test_tiles_stay_unmasked_where_no_row_reaches_the_window():
    tiles = masks(blocks=True)
    fast, masked = (tiles.get(window, torch.float32) for window in WINDOWS.values())
    assert fast is tiles.get(None, torch.float32)
    assert fast.full_kv_num_blocks is not None
    assert masked.full_kv_num_blocks is None


def test_a_dense_mask_hides_the_first_token_from_the_last_only_past_the_window():
    dense = masks(blocks=False)
    everything, nothing_more, one_less = (dense.get(w, torch.float32) for w in (None, *WINDOWS.values()))
    assert nothing_more is everything
    assert (one_less != everything).nonzero().tolist() == [[0, 0, LENGTH - 1, 0]]


def test_a_step_of_decoding_drops_a_window_as_long_as_the_cache():
    slots = 64
    slot, first = torch.arange(slots - 4, slots, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    step = _StepMasks({"slot": slot, "first": first, "shared": torch.zeros(1, dtype=torch.int32)}, slots)
    everything, nothing_more, one_less = (step.get(w, torch.float32) for w in (None, slots, slots - 1))
    assert torch.equal(nothing_more, everything)
    assert (one_less != everything).nonzero().tolist() == [[0, 0, 3, 0]]
