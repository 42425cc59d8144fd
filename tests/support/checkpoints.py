"""Checkpoints on disk: a random Llama, with the demo's tokenizer or none."""

from pathlib import Path


def save_tiny_llama(directory: Path, vocabulary: int, **changes) -> Path:
    """Writes a random two-layer Llama; its logits have natural variance so that errors show."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "vocab_size": vocabulary,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    model.save_pretrained(directory)
    return directory
