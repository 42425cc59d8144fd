"""Weights straight from the files into the model: the same bits as from_pretrained's, in bounded host memory."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import WEIGHTS, tensors_of
from support.models import ARCHITECTURES, VOCABULARY, digest_of_elements, load, save, skip_what_cannot_run, tiny_model
from support.waiting import HANG, wait_until
from transformers import AutoConfig, AutoModelForCausalLM

from cecompile.errors import UserError
from cecompile.model import digest
from cecompile.model import load as loading
from cecompile.model import safetensors_reader as streaming
from cecompile.model.checkpoint import read_checkpoint
from cecompile.model.safetensors_reader import Checkpoint

SHARDED = ("mistral", "gemma2", "opt")
RENAMED = ("gpt_neox",)  # what some versions of transformers call otherwise than its checkpoints do
PLAIN = {"format": "pt"}


@pytest.fixture
def llama(tmp_path) -> Path:
    return save(tmp_path, "llama")


def stock(path: Path, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours, theirs) -> None:
    """Every parameter and buffer, persistent or not, which of them are one, and the logits."""
    for named in ("named_parameters", "named_buffers"):
        expected = dict(getattr(theirs, named)(remove_duplicate=False))
        got = dict(getattr(ours, named)(remove_duplicate=False))
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            ours_is, theirs_is = ((one.dtype, one.shape, one.device) for one in (got[name], tensor))
            assert ours_is == theirs_is, name
            assert bits(got[name]) == bits(tensor), name
            assert not got[name].requires_grad
    assert len(list(ours.parameters())) <= len(list(theirs.parameters()))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.training is False
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    tokens = torch.arange(3, 43).view(2, 20) % VOCABULARY
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def loaded_as_stock(path: Path, dtype: str = "auto", device: str = "cpu"):
    """Loads a checkpoint; checks the model against from_pretrained's, and the fingerprint."""
    loaded = load(path, dtype, device)
    assert {tensor.device.type for tensor in (*loaded.model.parameters(), *loaded.model.buffers())} == {device}
    assert loaded.checkpoint.fingerprint == read_checkpoint(str(path)).fingerprint
    assert_same(loaded.model.cpu(), stock(path, dtype))
    return loaded


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_same_bits_as_from_pretrained(kind, dtype, tmp_path):
    path = save(tmp_path, kind, shard="20KB" if kind in SHARDED else "50GB")
    assert (len(list(path.glob("*.safetensors"))) > 1) == (kind in SHARDED)
    assert loaded_as_stock(path, dtype).fallback is None or kind in RENAMED


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_half_precision_files_tied_and_not(kind, tie, dtype, tmp_path):
    tiny_model(kind, tie_word_embeddings=tie).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = loaded_as_stock(tmp_path, dtype)
    assert loaded.fallback is None
    assert loaded.model.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert (loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight) == tie


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_cut_by_blocks(dtype, tmp_path, monkeypatch):
    """Blocks shorter than a tensor and of several tensors, with more of them than there are buffers."""
    monkeypatch.setattr(digest, "CHUNK", 300)
    monkeypatch.setattr(streaming, "BLOCK", 1000 * 8)
    assert loaded_as_stock(save(tmp_path, "qwen2"), dtype).fallback is None


@pytest.mark.parametrize("chunk", [4, 2**20])
def test_fingerprint_is_over_names_dtypes_shapes_and_bytes(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", chunk)
    contents = {
        "b": torch.randn(3, 5),
        "a": torch.tensor(2, dtype=torch.int64),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        "c": torch.randn(4).to(torch.float8_e4m3fn),
        "d": torch.tensor([True, False, True]),
    }
    save_file(contents, tmp_path / "model.safetensors")
    lines = [f"{n} {t.dtype} {tuple(t.shape)} {digest_of_elements(t, chunk)}" for n, t in contents.items()]
    assert read_checkpoint(str(tmp_path)).fingerprint == hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def test_other_dtypes_of_torch_have_their_names():
    for name in streaming._DTYPES.values():
        assert isinstance(getattr(torch, name), torch.dtype)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prefix_of_the_base_model_missing(kind, tmp_path):
    """As the first checkpoints of GPT-2 are."""
    model = tiny_model(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    prefix = model.base_model_prefix + "."
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k.removeprefix(prefix): v for k, v in tensors.items()}, tmp_path / WEIGHTS, PLAIN)
    assert loaded_as_stock(tmp_path).fallback is None


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_stored_twice(equal, tmp_path):
    """They are tied if they are the same; else the config is wrong, and they are not."""
    path = save(tmp_path, "llama", tie_word_embeddings=True)
    with tensors_of(path) as tensors:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if equal else embedding + 1
    loaded = loaded_as_stock(path)
    assert (loaded.fallback is None) == equal
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == equal


def test_what_was_made_beside_reading_is_dropped_with_the_model_it_was_made_for(tmp_path):
    path = save(tmp_path, "llama", tie_word_embeddings=True)
    with tensors_of(path) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    models: list[weakref.ref[torch.nn.Module]] = []

    def compile_a_part(model):
        model.model.norm.compile()  # which a module then holds itself by
        models.append(weakref.ref(model.model.norm))

    loaded = load(path, while_reading=compile_a_part)
    assert loaded.fallback is not None
    assert loaded.overlap is None
    assert [model() for model in models] == [None]


def test_reading_ends_where_nobody_waits_for_it(llama, monkeypatch):
    """Blocks already requested are read; the readers go on only once nobody waits."""
    interval = sys.getswitchinterval()
    monkeypatch.setattr(digest, "CHUNK", 64)
    monkeypatch.setattr(streaming, "BLOCK", 1024)
    reads, read, stream, waited_for = [], streaming._read, loading.stream, []

    def stream_and_tell(*arguments, given_up) -> Checkpoint:
        waited_for.append(given_up)
        return stream(*arguments, given_up=given_up)

    def read_late(*arguments) -> None:
        if reads:
            assert waited_for[0].wait(HANG)
        reads.append(read(*arguments))

    def interrupted(model):
        wait_until(lambda: reads)
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_read", read_late)
    monkeypatch.setattr(loading, "stream", stream_and_tell)
    blocks = (llama / WEIGHTS).stat().st_size // 1024
    with pytest.raises(KeyboardInterrupt):
        load(llama, while_reading=interrupted)
    assert len(reads) == streaming.BLOCKS < blocks
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("load", "read", "hash"))]
    assert sys.getswitchinterval() == interval


def test_a_file_cut_off_while_something_is_made_beside_reading_it(llama, monkeypatch):
    is_cut, read = threading.Event(), streaming._read

    def read_late(*arguments) -> None:
        assert is_cut.wait(HANG)
        read(*arguments)

    def cut(model):
        os.truncate(llama / WEIGHTS, (llama / WEIGHTS).stat().st_size - 100)
        is_cut.set()

    monkeypatch.setattr(streaming, "_read", read_late)
    with pytest.raises(UserError, match="became shorter while it was read"):
        load(llama, while_reading=cut)


def test_tied_weights_stored_by_the_other_name(tmp_path):
    path = save(tmp_path, "llama", tie_word_embeddings=True)
    with tensors_of(path) as tensors:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    assert loaded_as_stock(path).fallback is None


def test_tensors_the_model_has_not_are_ignored_but_fingerprinted(llama):
    plain = read_checkpoint(str(llama)).fingerprint
    with tensors_of(llama) as tensors:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.0.self_attn.bias"] = torch.ones(3, 3, dtype=torch.bool)
    loaded = loaded_as_stock(llama)
    assert loaded.fallback is None
    assert loaded.checkpoint.fingerprint != plain


def test_merged_experts_are_left_to_transformers(tmp_path):
    skip_what_cannot_run("mixtral")
    path = save(tmp_path, "mixtral", num_key_value_heads=2, num_local_experts=2)
    assert loaded_as_stock(path).fallback.startswith("transformers converts ")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.LayerNorm.gamma", torch.ones(32), "transformers converts model.LayerNorm.gamma"),
        ("model.norm.weight", torch.arange(32), "model.norm.weight is stored as torch.int64"),
    ],
    ids=["old names", "other types"],
)
def test_other_names_and_types_are_left_to_transformers(name, tensor, reason, llama):
    """A name that a rule of transformers fits is not taken by its letters, nor passed over."""
    with tensors_of(llama) as tensors:
        tensors[name] = tensor
    assert loaded_as_stock(llama).fallback == reason


# ---- files that are damaged


def with_header(change, before: bytes = b""):
    """Gives a function that changes the header of a safetensors file, and puts bytes before its tensors."""

    def rewrite(content: bytes) -> bytes:
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.dumps(change(json.loads(content[8:end]))).encode()
        return struct.pack("<Q", len(header)) + header + before + content[end:]

    return rewrite


def norm_at(offsets):
    name = "model.norm.weight"
    return with_header(lambda header: header | {name: header[name] | {"data_offsets": offsets}})


def a_byte_first(header):
    for name in header.keys() - {"__metadata__"}:
        header[name]["data_offsets"] = [x + 1 for x in header[name]["data_offsets"]]
    return {"byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}} | header


def overlapping(header):
    first, second = sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])[:2]
    header[second]["data_offsets"] = [x - 4 for x in header[second]["data_offsets"]]
    assert header[first]["data_offsets"][1] > header[second]["data_offsets"][0]
    return header


DAMAGED = {
    **{f"cut at {end}": lambda content, end=end: content[:end] for end in (0, 4, 100, -1)},
    "half": lambda content: content[: len(content) // 2],
    "a byte longer": lambda content: content + b"\0",
    **{f"norm at {at}": norm_at(at) for at in ([0, 10**12], [-4, 8], [8, 0], [4, 4], None, ["a", "b"])},
    "tensors that overlap": with_header(overlapping),
    **{
        f"{header[:9]} of {length} bytes": lambda _, header=header, length=length: struct.pack("<Q", length) + header
        for header in (b"", b"{", b"[]", b'{"a": 1}', b"\xff\xff", b"{" * 1000)
        for length in (len(header), 2**63)
    },
}


def refused(path: Path) -> str:
    """The one line that loading ends with."""
    with pytest.raises(UserError) as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: weights: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_are_no_safetensors_are_refused(name, llama):
    (llama / WEIGHTS).write_bytes(DAMAGED[name]((llama / WEIGHTS).read_bytes()))
    assert f"{WEIGHTS}: " in refused(llama)


def test_tensors_out_of_step_with_their_elements_are_left_to_transformers(llama):
    """A byte more before them: nothing forbids it."""
    (llama / WEIGHTS).write_bytes(with_header(a_byte_first, b"\0")((llama / WEIGHTS).read_bytes()))
    assert loaded_as_stock(llama).fallback.endswith("is stored as torch.float32, unaligned")


def test_weights_missing_or_of_another_shape(llama):
    with tensors_of(llama) as tensors:
        norm = tensors.pop("model.norm.weight")
    assert refused(llama).endswith("1 missing keys, such as model.norm.weight")
    save_file(tensors | {"model.norm.weights": norm}, llama / WEIGHTS, PLAIN)
    assert refused(llama).endswith("1 missing keys, such as model.norm.weight")
    save_file(tensors | {"model.norm.weight": norm[:-1].clone()}, llama / WEIGHTS, PLAIN)
    assert f"model.norm.weight in {WEIGHTS} is of shape (31,), the model's is (32,)" in refused(llama)


def test_a_file_that_shrinks_while_it_is_read(llama):
    file = llama / WEIGHTS
    tensors = streaming.read_header("it", file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"it: weights: model.safetensors: became shorter"):
        streaming.stream("it", tensors, {}, torch.device("cpu"))


# ---- memory, and a GPU


PEAK = r"""
import re, sys, torch
from cecompile.model import load, checkpoint as model
path, loads = sys.argv[1], sys.argv[2] == "load"
config = model.load_config(path)
network = load._skeleton(path, config, torch.float32)
if loads:
    network = model.load_checkpoint(path, config, sys.argv[3], torch.device("cpu"))
    if network.fallback is not None:
        sys.exit(network.fallback)
status = open("/proc/self/status").read()  # getrusage's peak is at least that of the process this was forked from
print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)
"""


@pytest.mark.process
@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("bfloat16", 2)])
def test_host_memory_is_the_parameters_and_a_constant(dtype, size, tmp_path):
    config = AutoConfig.for_model(
        "llama", vocab_size=24_000, hidden_size=1024, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=8
    )
    model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters * 4 > 400e6
    model.save_pretrained(tmp_path)
    del model

    def peak(what: str) -> int:
        command = [sys.executable, "-c", PEAK, str(tmp_path), what, dtype]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    more = peak("load") - peak("build")
    assert 0.9 * parameters * size < more < parameters * size + 0.3e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnCuda:
    @pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
    @pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt"])
    def test_same_bits_as_from_pretrained(self, kind, dtype, tmp_path, monkeypatch):
        monkeypatch.setattr(digest, "CHUNK", 300)
        monkeypatch.setattr(streaming, "BLOCK", 1000 * 8)
        path = save(tmp_path, kind, shard="20KB" if kind in SHARDED else "50GB")
        assert loaded_as_stock(path, dtype, "cuda").fallback is None

    def test_weights_are_allocated_once_and_buffers_are_given_back(self, tmp_path):
        path = save(tmp_path, "llama", vocab_size=50_000, hidden_size=512)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loaded = load(path, device="cuda")
        size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        assert size > 200e6
        assert torch.cuda.max_memory_allocated() - before < size * 1.01 + 2**20
        assert torch.cuda.host_memory_stats()["allocated_bytes.current"] < streaming.BLOCK * streaming.BLOCKS
        assert_same(loaded.model.cpu(), stock(path))
