"""Every decoder architecture is exact or refused: trees against the stock model, the docs' table against both lists."""

import re
from pathlib import Path

import numpy as np
import pytest
import transformers
from packaging.version import Version
from support.checkpoints import add_tokenizer
from support.models import ARCHITECTURES, COMMON, EXACT, SIZED, skip_what_cannot_run, tiny_model
from support.passes import generated, prepared, random_sequences
from transformers import AutoConfig

from cecompile import Answerer, Scorer
from cecompile.engine.probe import choose_attention
from cecompile.engine.reference import score_one_by_one
from cecompile.errors import UserError
from cecompile.model.structure import on_meta
from cecompile.model.support import refusal
from cecompile.run.answerer import decode
from cecompile.run.scorer import collect
from cecompile.workload.decode_schedule import DecodeShape

SINCE = {"codegen": "5.24", "gptj": "5.24"}  # with this version of transformers, these ask for attention by name
NO_FLEX = {
    "falcon": "attention of its own",
    "gpt_oss": "sinks need the kernel's normaliser, which the CPU's does not give",
    "xglm": "attention of its own",
} | {
    kind: "attention of its own" for kind, since in SINCE.items() if Version(transformers.__version__) < Version(since)
}
COMPILED = [kind for kind in EXACT if kind not in ("llama", "phi", "opt", "phi3")]  # those: test_engine
# Attention that is compiled with the layer in a way of its own: windows, soft caps, other sizes of keys and values.
OWN_FLEX = ("cohere2", "deepseek_v3", "exaone4", "gemma2", "gemma3_text", "gpt2", "mistral", "olmo3", "starcoder2")

LOCAL = {"attention_types": [[["global", "local"], 1]]}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
# model_type: (configuration, what the refusal says)
REFUSED = {
    "bloom": ({"n_layer": 2, "n_head": 4}, "ALiBi"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, "ALiBi"),
    "falcon with ALiBi": ({"alibi": True}, "ALiBi"),
    "mamba": ({"state_size": 8}, "keeps a state"),
    "recurrent_gemma": ({}, "keeps a state|attention cannot be replaced"),  # as the release of transformers marks it
    "gpt_neo": (LOCAL | {"num_layers": 2, "num_heads": 4}, "attention cannot be replaced"),
    "llama with dynamic rope": ({"rope_parameters": DYNAMIC}, "longest sequence of a batch"),
    "llama4_text": (SIZED | {"num_local_experts": 2, "intermediate_size_mlp": 64}, "chunked_attention"),
}


def model_type(name: str) -> str:
    return name.split()[0]


def config_of(name: str):
    return AutoConfig.for_model(model_type(name), **(COMMON | REFUSED[name][0]))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("kind", "attention"), [(k, "sdpa") for k in COMPILED] + [(k, "flex") for k in COMPILED if k not in NO_FLEX]
)
def test_compiled_trees_are_exact(kind, attention):
    """With flex, the layers around attention are compiled where attention has a way of its own."""
    skip_what_cannot_run(kind)
    model, sequences = tiny_model(kind, **EXACT[kind]), random_sequences(questions=5)
    expected, expected_greedy = score_one_by_one(model, sequences)
    assert choose_attention(model, attention) == (attention, None)
    engine, staged = prepared(model, sequences, attention, compiled=attention == "sdpa" or kind in OWN_FLEX)
    assert len(engine.buckets) == 1  # one shape to compile
    got, greedy = collect(len(sequences), staged, engine.run(staged))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)
    assert (greedy == expected_greedy).all()


@pytest.mark.parametrize("kind", NO_FLEX)
def test_where_flex_does_not_go_it_is_refused_with_the_reason(kind):
    skip_what_cannot_run(kind)
    model = tiny_model(kind, **EXACT[kind])
    with pytest.raises(UserError, match=r"cannot be scored as trees \(flex: "):
        choose_attention(model, "flex")


@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind not in ARCHITECTURES])
def test_decodes_as_generate_does(kind):
    skip_what_cannot_run(kind)
    model, random = tiny_model(kind, **EXACT[kind]), np.random.default_rng(1)
    prompts = [random.integers(3, 96, n).astype(np.int32) for n in (1, 30, 7, 23)]
    expected = [generated(model, prompt, 8, None) for prompt in prompts]
    engine, _ = prepared(model, random_sequences(), "sdpa", compiled=False)
    decoder = engine.decoder(DecodeShape(128, 3, (16, 3)))
    assert decode(decoder, prompts, [8] * len(prompts), frozenset()) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_before_loading(name, tmp_path):
    config = config_of(name)
    assert re.search(REFUSED[name][1], refusal(on_meta(config)))
    with pytest.raises(UserError, match="cannot be scored as trees"):
        choose_attention(on_meta(config), "auto")
    config.save_pretrained(tmp_path)  # there are no weights at all
    add_tokenizer(tmp_path)
    for kind in (Scorer, Answerer):
        with pytest.raises(UserError, match=f"({REFUSED[name][1]}).*--engine reference runs them"):
            kind.from_pretrained(tmp_path, device="cpu")
    assert Scorer.from_pretrained(tmp_path, device="cpu", engine="reference").runtime.weights.model is None


def test_the_documented_table_is_these_lists():
    text = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    cells = {names: how for names, how in rows if names not in ("---", "`model_type`")}
    both = [kind for kind in EXACT if kind not in NO_FLEX and kind not in SINCE]
    listed = {how: set(re.findall(r"`([\w ]+?)`", names)) for names, how in cells.items()}
    assert listed["exact, `flex` and `sdpa`"] == set(both)
    assert listed["exact, `sdpa`"] == set(NO_FLEX) - set(SINCE)
    assert listed["exact, `sdpa`; with transformers 5.24 and later `flex` too"] == set(SINCE)
    refused = {name for how, names in listed.items() if how.startswith("refused") for name in names}
    assert refused == {model_type(name) for name in REFUSED} - {"falcon", "llama"}
