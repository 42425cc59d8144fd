"""Checkpoints on disk: a random Llama, with the demo's tokenizer or none, and tensors changed in their file."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cecompile import demo
from support.rows import shared_file

WEIGHTS = "model.safetensors"


def save_tiny_llama(directory: Path, vocabulary: int, **changes) -> Path:
    """Writes a random two-layer Llama; its logits have natural variance so that errors show."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(sizes | changes))).save_pretrained(directory)
    return directory


def add_tokenizer(directory: Path) -> Path:
    """Puts the demo's tokenizer beside a model; returns the directory."""
    for file in demo.MODEL.glob("token*"):
        shutil.copy(file, directory)
    return directory


def save_demo_llama(directory: Path, **changes) -> Path:
    """Writes a random two-layer Llama with the demo's tokenizer."""
    return add_tokenizer(save_tiny_llama(directory, 1024, **changes))


def add_llama2_tokenizer(directory: Path, **marks: object) -> None:
    """Puts the Llama-2 tokenizer into a directory; skips the test where the tokenizer is absent."""
    (directory / "tokenizer.model").write_bytes(shared_file("llama_tokenizer.model").read_bytes())
    common = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(common | marks))


def change_json(path: Path, **changes: object) -> None:
    """Puts fields into the object of a JSON file; None removes a field."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def copy_without_weights(model: Path, directory: Path) -> Path:
    """Copies a checkpoint's configuration and tokenizer."""
    return shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*safetensors*"))


@contextmanager
def tensors_of(directory: Path) -> Iterator[dict[str, Any]]:
    """Gives the tensors of a checkpoint's file to change, and writes them back."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / WEIGHTS)
    yield tensors
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
