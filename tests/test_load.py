"""Weights straight from the files into the model: the same bits as from_pretrained's, in bounded host memory."""

import ctypes
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from support.checkpoints import tensors_of
from support.models import ARCHITECTURES, VOCABULARY, skip_what_cannot_run, tiny_model
from support.waiting import HANG, wait_until
from transformers import AutoConfig, AutoModelForCausalLM

from cecompile.errors import UserError
from cecompile.model import load as loading
from cecompile.model import prefetch
from cecompile.model import safetensors_reader as streaming
from cecompile.model.checkpoint import load_checkpoint, load_config, read_checkpoint
from cecompile.model.safetensors_reader import Checkpoint

CPU = torch.device("cpu")
SHARDED = ("mistral", "gemma2", "opt")
RENAMED = ("gpt_neox",)  # what some versions of transformers call otherwise than its checkpoints do


def save(path: Path, kind: str, *, shard: str = "50GB", **changes) -> Path:
    tiny_model(kind, **changes).save_pretrained(path, max_shard_size=shard)
    return path


def stock(path: Path, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)


def load(path: Path, dtype: str = "auto", **how):
    return load_checkpoint(str(path), load_config(str(path)), dtype, CPU, **how)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours, theirs) -> None:
    """Every parameter and buffer, persistent or not, which of them are one, and the logits."""
    for named in ("named_parameters", "named_buffers"):
        expected = dict(getattr(theirs, named)(remove_duplicate=False))
        got = dict(getattr(ours, named)(remove_duplicate=False))
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype, name
            assert got[name].shape == tensor.shape, name
            assert got[name].device == tensor.device, name
            assert bits(got[name]) == bits(tensor), name
            assert not got[name].requires_grad
    # some versions of transformers do not tie equal weights that are stored twice
    assert len(list(ours.parameters())) <= len(list(theirs.parameters()))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.training is False
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    tokens = torch.arange(3, 43).view(2, 20) % VOCABULARY
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_same_bits_as_from_pretrained(kind, dtype, tmp_path):
    path = save(tmp_path, kind, shard="20KB" if kind in SHARDED else "50GB")
    assert (len(list(path.glob("*.safetensors"))) > 1) == (kind in SHARDED)
    loaded = load(path, dtype)
    assert loaded.fallback is None or kind in RENAMED
    assert_same(loaded.model, stock(path, dtype))
    assert loaded.checkpoint.fingerprint == read_checkpoint(str(path)).fingerprint


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_half_precision_files_tied_and_not(kind, tie, dtype, tmp_path):
    tiny_model(kind, tie_word_embeddings=tie).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype)
    assert loaded.fallback is None
    assert loaded.model.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    embeddings = (loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight)
    assert (embeddings[0] is embeddings[1]) == tie
    assert_same(loaded.model, stock(tmp_path, dtype))


def test_tensors_cut_by_blocks(tmp_path, monkeypatch):
    """Blocks shorter than a tensor and of several tensors, with more of them than there are buffers."""
    monkeypatch.setattr(streaming, "BLOCK", 1000 * 8)
    path = save(tmp_path, "qwen2")
    for dtype in ("float32", "bfloat16"):
        loaded = load(path, dtype)
        assert loaded.fallback is None
        assert_same(loaded.model, stock(path, dtype))
        assert loaded.checkpoint.fingerprint == read_checkpoint(str(path)).fingerprint


def test_fingerprint_is_over_names_dtypes_shapes_and_bytes(tmp_path):
    import hashlib

    contents = {
        "b": torch.randn(3, 5),
        "a": torch.tensor(2, dtype=torch.int64),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        "c": torch.randn(4).to(torch.float8_e4m3fn),
        "d": torch.tensor([True, False, True]),
    }
    save_file(contents, tmp_path / "model.safetensors")
    lines = [f"{n} {t.dtype} {tuple(t.shape)} {hashlib.sha256(bits(t)).hexdigest()}" for n, t in contents.items()]
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
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k.removeprefix(prefix): v for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert loaded.fallback is None
    assert_same(loaded.model, stock(tmp_path))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_stored_twice(equal, tmp_path):
    """They are tied if they are the same; else the config is wrong, and they are not."""
    path = save(tmp_path, "llama", tie_word_embeddings=True)
    with tensors_of(path) as tensors:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if equal else embedding + 1
    loaded = load(path)
    assert (loaded.fallback is None) == equal
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == equal
    assert_same(loaded.model, stock(path))
    assert loaded.checkpoint.fingerprint == read_checkpoint(str(path)).fingerprint


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


def test_reading_ends_where_nobody_waits_for_it(tmp_path, monkeypatch):
    """Blocks already requested are read; the readers go on only once nobody waits."""
    path, interval = save(tmp_path, "llama"), sys.getswitchinterval()
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
    blocks = (path / "model.safetensors").stat().st_size // 1024
    with pytest.raises(KeyboardInterrupt):
        load(path, while_reading=interrupted)
    assert len(reads) == streaming.BLOCKS < blocks
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("load", "read", "hash"))]
    assert sys.getswitchinterval() == interval


def test_a_file_cut_off_while_something_is_made_beside_reading_it(tmp_path, monkeypatch):
    path = save(tmp_path, "llama")
    is_cut, read = threading.Event(), streaming._read

    def read_late(*arguments) -> None:
        assert is_cut.wait(HANG)
        read(*arguments)

    def cut(model):
        os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 100)
        is_cut.set()

    monkeypatch.setattr(streaming, "_read", read_late)
    with pytest.raises(UserError, match="became shorter while it was read"):
        load(path, while_reading=cut)


def out_of_the_page_cache(path: Path) -> None:
    """Skips the test where the system does not do so, or does not say."""
    path.read_bytes()
    if not all(cached(path)):
        pytest.skip("the system does not say what is in the page cache")
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        for _ in range(100):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not pages_in_memory(path):
                return
            time.sleep(0.05)
    pytest.skip("the page cache does not do as it is told")


def pages_in_memory(path: Path) -> int:
    """Pages of a file in the page cache, by mincore(2); to ask as the code under test does may make the system read."""
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        found = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        begin = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapped)), found) == 0
        del begin  # or the mapping cannot be closed
        return sum(page & 1 for page in found.raw)


def cached(path: Path) -> list[bool]:
    with path.open("rb") as opened:
        return [prefetch._is_cached(opened.fileno(), at) for at in range(0, path.stat().st_size, prefetch.PIECE)]


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    """A checkpoint of two files of four pieces each; nothing of it is in the page cache."""
    monkeypatch.setattr(prefetch, "PIECE", 2**20)
    monkeypatch.setattr(prefetch, "NEAR", 2**20)
    monkeypatch.setattr(prefetch, "_running", [])
    files = [tmp_path / name for name in ("b.safetensors", "a.safetensors")]
    for file in files:
        file.write_bytes(os.urandom(4 * 2**20))
        out_of_the_page_cache(file)
    weights = {f"x{i}": file.name for i, file in enumerate(files)}
    (tmp_path / prefetch.INDEX).write_text(json.dumps({"weight_map": weights}))
    return files


def test_files_are_read_ahead_where_memory_holds_them_twice(two_files, monkeypatch):
    monkeypatch.setattr(prefetch, "memory_left", lambda: 16 * 2**20 - 1)
    prefetch.begin(str(two_files[0].parent))
    assert not prefetch._running
    monkeypatch.setattr(prefetch, "memory_left", lambda: 16 * 2**20)
    prefetch.begin(str(two_files[0].parent))
    prefetch._running[0].join()
    assert [cached(file) for file in two_files] == [[True] * 4] * 2


def test_files_in_the_hubs_cache_are_found(two_files, tmp_path, monkeypatch):
    revision = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    for path in (*two_files, tmp_path / prefetch.INDEX):
        (revision / path.name).symlink_to(path)
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert prefetch._files("some/model") == sorted(revision / file.name for file in two_files)
    assert prefetch._files("some/other") == []


def test_reading_ahead_ends_where_loading_has_caught_up(two_files, monkeypatch):
    monkeypatch.setattr(prefetch, "_is_cached", lambda *_: False)  # a system may read more than it is asked for
    last, first = two_files
    preadv, read = os.preadv, []

    def loading(descriptor, buffers, start, flags=0):
        """Comes to where the thread is in the second file, once it is there."""
        done = preadv(descriptor, buffers, start, flags)
        read.append(start // 2**20)
        prefetch.reached(*((first, start - 2**21) if len(read) < 6 else (last, start - 2**20)))
        return done

    one = prefetch.Prefetch([first, last])
    prefetch._running.append(one)
    monkeypatch.setattr(os, "preadv", loading)
    one.start()
    one.join()
    assert read == [0, 1, 2, 3, 0, 1]


def test_what_is_no_checkpoint_is_not_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "_running", [])
    (tmp_path / "elsewhere").write_text("not of the checkpoint")
    weights = ("1", '"missing"', '"../elsewhere"', f'"{tmp_path}/elsewhere"')
    for content in ("", "[]", "{}", 100_000 * "[", *(f'{{"weight_map": {{"a": {file}}}}}' for file in weights)):
        (tmp_path / prefetch.INDEX).write_text(content)
        prefetch.begin(str(tmp_path))
    prefetch.begin("hub/id")
    assert not prefetch._running


def test_tied_weights_stored_by_the_other_name(tmp_path):
    path = save(tmp_path, "llama", tie_word_embeddings=True)
    with tensors_of(path) as tensors:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    loaded = load(path)
    assert loaded.fallback is None
    assert_same(loaded.model, stock(path))


def test_tensors_the_model_has_not_are_ignored_but_fingerprinted(tmp_path):
    path = save(tmp_path, "llama")
    plain = read_checkpoint(str(path)).fingerprint
    with tensors_of(path) as tensors:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.0.self_attn.bias"] = torch.ones(3, 3, dtype=torch.bool)
    loaded = load(path)
    assert loaded.fallback is None
    assert_same(loaded.model, stock(path))
    assert loaded.checkpoint.fingerprint == read_checkpoint(str(path)).fingerprint != plain


def test_tensors_out_of_step_with_their_elements_are_left_to_transformers(tmp_path):
    """A byte more before them: nothing forbids it."""
    path = save(tmp_path, "llama")

    def change(header):
        for name in header.keys() - {"__metadata__"}:
            header[name]["data_offsets"] = [x + 1 for x in header[name]["data_offsets"]]
        return {"byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}} | header

    damage(path / "model.safetensors", change, b"\0")
    loaded = load(path)
    assert loaded.fallback.endswith("is stored as torch.float32, unaligned")
    assert_same(loaded.model, stock(path))


def test_merged_experts_are_left_to_transformers(tmp_path):
    skip_what_cannot_run("mixtral")
    path = save(tmp_path, "mixtral", num_key_value_heads=2, num_local_experts=2)
    loaded = load(path)
    assert loaded.fallback.startswith("transformers converts ")
    assert_same(loaded.model, stock(path))
    assert loaded.checkpoint.fingerprint == read_checkpoint(str(path)).fingerprint


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.LayerNorm.gamma", torch.ones(32), "transformers converts model.LayerNorm.gamma"),
        ("model.norm.weight", torch.arange(32), "model.norm.weight is stored as torch.int64"),
    ],
    ids=["old names", "other types"],
)
def test_other_names_and_types_are_left_to_transformers(name, tensor, reason, tmp_path):
    """A name that a rule of transformers fits is not taken by its letters, nor passed over."""
    path = save(tmp_path, "llama")
    with tensors_of(path) as tensors:
        tensors[name] = tensor
    loaded = load(path)
    assert loaded.fallback == reason
    assert_same(loaded.model, stock(path))


def damage(path: Path, change, before: bytes = b"") -> None:
    """Rewrites the header of a safetensors file, and puts bytes before its tensors."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + before + content[8 + length :])


def refused(path: Path) -> str:
    """The one line that loading ends with."""
    with pytest.raises(UserError) as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: weights: ")
    assert len(message.splitlines()) == 1
    return message


def test_files_cut_off(tmp_path):
    path = save(tmp_path, "llama")
    file = path / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        assert "model.safetensors: " in refused(path)
    file.write_bytes(content + b"\0")
    assert "model.safetensors: " in refused(path)


@pytest.mark.parametrize("offsets", [[0, 10**12], [-4, 8], [8, 0], [4, 4], None, ["a", "b"]])
def test_offsets_that_cannot_be(offsets, tmp_path):
    path = save(tmp_path, "llama")

    def change(header):
        header["model.norm.weight"]["data_offsets"] = offsets
        return header

    damage(path / "model.safetensors", change)
    assert "model.safetensors: " in refused(path)


def test_tensors_that_overlap(tmp_path):
    path = save(tmp_path, "llama")

    def change(header):
        first, second = sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])[:2]
        header[second]["data_offsets"] = [x - 4 for x in header[second]["data_offsets"]]
        assert header[first]["data_offsets"][1] > header[second]["data_offsets"][0]
        return header

    damage(path / "model.safetensors", change)
    assert "model.safetensors: " in refused(path)


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xff", b"{" * 1000])
def test_headers_that_are_none(header, tmp_path):
    path = save(tmp_path, "llama")
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "model.safetensors: " in refused(path)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + header)
    assert "model.safetensors: " in refused(path)


def test_weights_missing_or_of_another_shape(tmp_path):
    path = save(tmp_path, "llama")
    with tensors_of(path) as tensors:
        norm = tensors.pop("model.norm.weight")
    assert refused(path).endswith("1 missing keys, such as model.norm.weight")
    save_file(tensors | {"model.norm.weights": norm}, path / "model.safetensors", {"format": "pt"})
    assert refused(path).endswith("1 missing keys, such as model.norm.weight")
    save_file(tensors | {"model.norm.weight": norm[:-1].clone()}, path / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight in model.safetensors is of shape (31,), the model's is (32,)" in refused(path)


def test_shards_missing_or_an_index_that_is_none(tmp_path):
    path = save(tmp_path, "llama", shard="20KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    assert f"no {shard.name}, which model.safetensors.index.json names" in refused(path)
    shard.write_bytes(content[:-1])
    assert f"{shard.name}: " in refused(path)
    for index in ("", "[]", "{}", '{"weight_map": 3}'):
        (path / "model.safetensors.index.json").write_text(index)
        assert "model.safetensors.index.json" in refused(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = save(tmp_path, "llama")
    file = path / "model.safetensors"
    tensors = streaming.read_header("it", file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"it: weights: model.safetensors: became shorter"):
        streaming.stream("it", tensors, {}, CPU)


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
        monkeypatch.setattr(streaming, "BLOCK", 1000 * 8)
        path = save(tmp_path, kind, shard="20KB" if kind in SHARDED else "50GB")
        loaded = load_checkpoint(str(path), load_config(str(path)), dtype, torch.device("cuda", 0))
        assert loaded.fallback is None
        assert {tensor.device.type for tensor in (*loaded.model.parameters(), *loaded.model.buffers())} == {"cuda"}
        assert loaded.checkpoint.fingerprint == read_checkpoint(str(path)).fingerprint
        assert_same(loaded.model.cpu(), stock(path, dtype))

    def test_weights_are_allocated_once_and_buffers_are_given_back(self, tmp_path):
        path = save(tmp_path, "llama", vocab_size=50_000, hidden_size=512)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loaded = load_checkpoint(str(path), load_config(str(path)), "auto", torch.device("cuda", 0))
        size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        assert size > 200e6
        assert torch.cuda.max_memory_allocated() - before < size * 1.01 + 2**20
        assert torch.cuda.host_memory_stats()["allocated_bytes.current"] < streaming.BLOCK * streaming.BLOCKS
        assert_same(loaded.model.cpu(), stock(path))
