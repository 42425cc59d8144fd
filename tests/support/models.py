"""Tiny random models of every supported architecture."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cecompile.model.checkpoint import load_checkpoint, load_config

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},
    "qwen2": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "gemma2": {
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {},
    "gpt_neox": {},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0, "attention_multiplier": 0.2},
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
SIZED = GROUPED | {"head_dim": 8}
WINDOWED = {"sliding_window": 9}
EXPERTS = {"num_experts_per_tok": 2}
MIXTURES = ("deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe")
MIXED = WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}
# model_type: what the tiny model has beside COMMON. All of it matters to attention, head or routing.
EXACT = ARCHITECTURES | {
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "cohere": GROUPED,
    "cohere2": GROUPED | WINDOWED,
    "deepseek_v3": EXPERTS
    | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "exaone4": GROUPED | MIXED,
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "gemma": SIZED | {"tie_word_embeddings": True},
    "gemma3_text": SIZED | MIXED,
    "glm4": SIZED,
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_oss": SIZED | WINDOWED | EXPERTS | {"num_local_experts": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "mixtral": GROUPED | EXPERTS | {"num_local_experts": 4},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWED,
    "qwen3": SIZED,
    "qwen3_moe": SIZED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32},
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED | WINDOWED,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
}  # fmt: skip


def tiny_model(kind: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(COMMON | ARCHITECTURES.get(kind, {}) | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)


def save(path: Path, kind: str, *, shard: str = "50GB", **changes) -> Path:
    tiny_model(kind, **changes).save_pretrained(path, max_shard_size=shard)
    return path


def load(path: Path, dtype: str = "auto", device: str = "cpu", **how):
    """Loads a checkpoint as a run does: the first CUDA device is meant by "cuda"."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return load_checkpoint(str(path), load_config(str(path)), dtype, place, **how)


def skip_what_cannot_run(kind: str) -> None:
    """transformers computes experts by grouped products, which torch has on the CPU in 2.13, and has not in 2.8."""
    one = torch.zeros(1, 16, 16, dtype=torch.bfloat16)
    if kind in MIXTURES:
        try:
            torch._grouped_mm(one[0], one, offs=torch.tensor([16], dtype=torch.int32))
        except NotImplementedError:
            pytest.skip("this torch has no grouped products on the CPU")


def digest_of_elements(tensor: torch.Tensor, chunk: int) -> str:
    """SHA-256 (hex) over the SHA-256 digests of a tensor's chunks, of `chunk` elements each."""
    content, size = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), chunk * tensor.element_size()
    digests = (hashlib.sha256(content[start : start + size]).digest() for start in range(0, len(content), size))
    return hashlib.sha256(b"".join(digests)).hexdigest()
