"""Weights are held against their files, and whatever changed while a run went on is named."""

import pytest
import torch
from support.checkpoints import tensors_of
from support.models import EXACT, digest_of_elements, load, save, tiny_model
from support.rows import ROWS, write_rows
from torch import nn
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from cecompile import Scorer, demo, evaluate, read_questions
from cecompile.errors import CheckError
from cecompile.model import digest
from cecompile.model.checkpoint import load_tokenizer
from cecompile.model.tokenizer_digest import tokenizer_digest
from cecompile.model.unchanged import EQUAL, Proof, contents, made_buffers
from cecompile.results.check import problems


@pytest.fixture
def scorer(tiny_llama) -> Scorer:
    return Scorer.from_pretrained(tiny_llama, device="cpu", engine="eager", tokens_per_bucket=256)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list:
    return read_questions(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS[:6]))


# While a run goes on


def drop_a_layer(model):
    model.model.layers = model.model.layers[:-1]


def cast_to_int8(model):
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.to(torch.int8), requires_grad=False)


CHANGES = {
    "a value": (
        lambda m: m.model.layers[1].mlp.up_proj.weight.data[3, 4].add_(1e-3),
        "model.layers.1.mlp.up_proj.weight has other values after the run than were loaded",
    ),
    "a dtype": (cast_to_int8, r"model.norm.weight is int8 \[64\] after the run, it was loaded as float32 \[64\]"),
    "all dtypes": (lambda m: m.half(), r"model.embed_tokens.weight is float16 .* it was loaded as float32"),
    "a layer": (drop_a_layer, "model.layers.1.self_attn.q_proj.weight disappeared during the run"),
    "a buffer": (lambda m: m.model.rotary_emb.inv_freq.mul_(1.01), "model.rotary_emb.inv_freq has other values"),
    "one more": (lambda m: m.register_buffer("more", torch.ones(1)), "more appeared during the run"),
    "config": (lambda m: setattr(m.config, "num_hidden_layers", 1), "configuration's num_hidden_layers changed"),
}


def changing(scorer: Scorer, change, begins: bool = False):
    """Progress that changes the model as inference ends, or begins."""

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "inference" and done == (0 if begins else total):
            change(scorer.runtime.weights.model)

    return progress


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_during_the_run_is_named_and_nothing_is_written(name, scorer, questions, tmp_path):
    change, message = CHANGES[name]
    with torch.no_grad(), pytest.raises(CheckError, match=f"{message}.*; nothing was written"):
        evaluate(scorer, questions, progress=changing(scorer, change), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_dropped_before_the_first_pass(scorer, questions):
    with pytest.raises(CheckError, match=r"model\.layers\.1"):
        evaluate(scorer, questions, progress=changing(scorer, drop_a_layer, begins=True))


def test_an_adopted_model_is_unchanged_since_the_run_began(tiny_llama, questions):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)
    model.register_buffer("persistent", torch.ones(3))
    scorer = Scorer.from_model(model, load_tokenizer(str(tiny_llama)), engine="eager")
    facts = evaluate(scorer, questions).results["model"]
    assert (facts["fingerprint"], facts["stored_dtypes"]) == (None, None)
    assert facts["verified"] == "unchanged since adopted"
    model.persistent += 1  # between runs it is the owner's business
    again = evaluate(scorer, questions).results["model"]
    assert again["device_fingerprint"] != facts["device_fingerprint"]

    with pytest.raises(CheckError, match="persistent has other values"):
        evaluate(scorer, questions, progress=changing(scorer, lambda m: m.persistent.add_(1)))


class Rounded(nn.Linear):
    """A linear layer of other code."""


REPLACED = {
    "model.layers.0.mlp.up_proj": lambda module: setattr(module, "__class__", Rounded),
    "model.layers.1": lambda module: module.register_forward_hook(lambda *_: None),
    "model.layers.1.mlp": lambda module: setattr(module, "forward", module.forward),
}


@pytest.mark.parametrize("name", REPLACED)
def test_modules_of_other_code_are_listed(name, scorer, questions, tmp_path):
    REPLACED[name](scorer.runtime.load().get_submodule(name))
    facts = evaluate(scorer, questions, output=tmp_path / "out").results["model"]
    assert facts["changed"]["replaced_modules"] == [name]
    assert problems(tmp_path / "out") == [f"results.json: model.changed: 1 replaced modules, such as {name}"]


# From the files to the device


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_way_from_the_file_to_the_device_is_proven_too(dtype, tiny_llama):
    loaded = load(tiny_llama, dtype)
    proof = Proof(loaded.model, loaded)
    assert proof.verified == (EQUAL if dtype == "auto" else f"{EQUAL}, converted to bfloat16")
    assert (proof.check("it", loaded.model) == loaded.checkpoint.fingerprint) == (dtype == "auto")
    loaded.model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(CheckError, match=r"it: model\.layers\.0\.mlp\.up_proj\.weight has other values"):
        Proof(loaded.model, loaded).check("it", loaded.model)


def test_tied_weights_stored_twice_are_the_checkpoints(tmp_path):
    save(tmp_path, "llama", tie_word_embeddings=True)
    with tensors_of(tmp_path) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["ignored"] = torch.ones(2)
    loaded = load(tmp_path)
    assert Proof(loaded.model, loaded).check("it", loaded.model) == loaded.checkpoint.fingerprint


def test_a_buffer_changed_while_weights_were_read_shows(tiny_llama):
    def run_too_early(model):
        before = made_buffers(model)
        model.model.rotary_emb.inv_freq[0] += 1
        return before

    loaded = load(tiny_llama, while_reading=run_too_early)
    proof = Proof(loaded.model, loaded, loaded.overlap.made)
    with pytest.raises(CheckError, match=r"it: model\.rotary_emb\.inv_freq has other values"):
        proof.check("it", loaded.model)


def test_what_transformers_loaded_is_unchanged_since(tmp_path):
    loaded = load(save(tmp_path, "mixtral", num_key_value_heads=2, num_local_experts=2))
    assert loaded.fallback is not None
    proof = Proof(loaded.model, loaded)
    assert proof.verified == "unchanged since loading"
    assert proof.check("it", loaded.model) == proof.check("it", loaded.model)
    loaded.model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(CheckError, match=r"lm_head\.weight"):
        proof.check("it", loaded.model)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("xglm", EXACT["xglm"]),
        ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE | {"factor": 8.0}}),
    ],
)
def test_buffers_that_follow_the_input_are_no_change(kind, sizes):
    model = tiny_model(kind, **sizes)
    proof = Proof(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.ones(1, 200, dtype=torch.long))
    after = dict(model.named_buffers())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    proof.check("it", model)
    model.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(CheckError, match="has other values"):
        proof.check("it", model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
@pytest.mark.parametrize("chunk", [520, 2**20])
def test_contents_are_those_of_the_bytes(dtype, chunk, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", chunk)
    check_contents(dtype, torch.device("cpu"))


def check_contents(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(70, 30).to(dtype)
    named = {"one": matrix[0, 0], "none": matrix[:0], "matrix": matrix, "columns": matrix.t()}
    found = contents({name: tensor.to(device) for name, tensor in named.items()})
    for name, tensor in named.items():
        assert found[name].digest == digest_of_elements(tensor, digest.CHUNK)
        assert (found[name].dtype, found[name].shape) == (dtype, tuple(tensor.shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("block", [1 << 20, 520])
def test_contents_on_cuda_come_in_blocks(block, monkeypatch):
    monkeypatch.setattr("cecompile.model.unchanged.BLOCK", block)
    monkeypatch.setattr(digest, "CHUNK", block)
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        check_contents(dtype, torch.device("cuda", 0))


# Tokenizers


def test_a_tokenizers_digest_is_of_what_it_does():
    one, other = (load_tokenizer(str(demo.MODEL)) for _ in range(2))
    other(["short", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(one) == tokenizer_digest(other)
    other.chat_template = "{{ messages }}"
    assert tokenizer_digest(one) != tokenizer_digest(other)
    one.add_tokens(["another"])
    assert tokenizer_digest(one) != tokenizer_digest(load_tokenizer(str(demo.MODEL)))


def test_slow_tokenizers_have_one_too():
    assert not ByT5Tokenizer().is_fast
    assert tokenizer_digest(ByT5Tokenizer()) == tokenizer_digest(ByT5Tokenizer())
    assert tokenizer_digest(ByT5Tokenizer()) != tokenizer_digest(ByT5Tokenizer(extra_ids=5))
