"""Parts of a model, one after another, are the model; and what is loaded of a checkpoint for each."""

import copy

import pytest
import torch
from support.models import EXACT, skip_what_cannot_run, tiny_model

from cecompile.model.checkpoint import load_config
from cecompile.model.load import load_plainly
from cecompile.model.safetensors_reader import digest_of
from cecompile.model.structure import LayerRange
from cecompile.partitioned.span import Span
from cecompile.planning.sizes import model_sizes

CPU = torch.device("cpu")


@torch.inference_mode()
@pytest.mark.parametrize("kind", EXACT)
def test_parts_one_after_another_are_the_model(kind):
    skip_what_cannot_run(kind)
    model = tiny_model(kind, **EXACT[kind])
    ids = torch.arange(24).reshape(2, 12) % 50 + 3
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    first, second = Span(copy.deepcopy(model), LayerRange(0, 1, 2)), Span(model, LayerRange(1, 2, 2))
    between = first(ids, None)
    assert not torch.equal(between, expected)
    torch.testing.assert_close(second(ids, between), expected, rtol=0, atol=0)


def test_only_a_share_is_loaded_and_the_parts_digests_are_the_whole_ones(tiny_llama):
    config = load_config(str(tiny_llama))
    files = [tiny_llama / "model.safetensors"]
    whole = load_plainly("m", config, None, CPU, files)
    parts = []
    for share in (LayerRange(0, 1, 2, with_head=False), LayerRange(1, 2, 2, with_embedding=False)):
        one = load_plainly("m", config, None, CPU, files, share, read_all=False)
        there = {n: t for n, t in one.model.state_dict().items() if not t.is_meta}
        assert set(one.sources) == set(there) < set(whole.sources)
        assert sum(t.numel() for t in there.values()) == model_sizes(config, "auto", share).parameters
        assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in there.items())
        parts.append(one)
    digests = list(parts[0].checkpoint.digests)
    for indices in parts[1].sources.values():
        digests[indices[0]] = parts[1].checkpoint.digests[indices[0]]
    assert digest_of(whole.checkpoint.tensors, digests) == whole.checkpoint.fingerprint
    read_all = load_plainly("m", config, None, CPU, files, LayerRange(0, 1, 2), read_all=True)
    assert read_all.checkpoint.fingerprint == whole.checkpoint.fingerprint
