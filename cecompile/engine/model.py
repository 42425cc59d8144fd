"""Loading a checkpoint unchanged, and its fingerprint."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from cecompile.errors import UserError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def resolve_device(name: str) -> torch.device:
    """The device of that name, made torch's current one; "auto" is the first CUDA device, else the CPU.

    Raises:
        UserError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise UserError(f"--device {name}: this machine's torch {torch.__version__} sees {count} CUDA devices")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def load_config(model: str) -> Any:
    """The model's configuration.

    Raises:
        UserError: none can be loaded, or it is not of a decoder-only language model.
    """
    try:
        path = Path(model)
        there, no_config = path.exists(), path.is_dir() and not (path / "config.json").is_file()
    except OSError as error:
        raise UserError(f"{model}: cannot be read: {error.strerror}") from None
    if no_config:
        raise UserError(f"{model}: no config.json in this directory")
    if not there and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"{model}: no such directory")
    config = _loading(model, "config.json", lambda: AutoConfig.from_pretrained(model, trust_remote_code=False))
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model}: {config.model_type} is an encoder-decoder model; decoder-only models are scored")
    return config


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: none can be loaded.
    """
    return _loading(model, "tokenizer", lambda: AutoTokenizer.from_pretrained(model, trust_remote_code=False))


def load_model(model: str, config: Any, dtype: str, device: torch.device) -> PreTrainedModel:
    """The stock model with the checkpoint's weights, on `device`, for inference.

    Args:
        model: a directory or a hub id with safetensors files.
        config: what `load_config` returned.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: where to.

    Raises:
        UserError: files are missing or damaged, or weights are missing from them.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of missing weights is ours to make
    transformers_logging.disable_progress_bar()
    try:
        loaded, info = _loading(
            model,
            "weights",
            lambda: AutoModelForCausalLM.from_pretrained(
                model,
                config=config,
                dtype=DTYPES.get(dtype, "auto"),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            ),
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            example = sorted(map(str, info[kind]))[0]
            raise UserError(f"{model}: weights: {len(info[kind])} {kind.replace('_', ' ')}, such as {example}")
    return loaded.eval().requires_grad_(False).to(device)


def check_vocabulary(model: str, tokenizer: Any, config: Any, used: int) -> None:
    """Refuses a tokenizer whose ids go past the model's embedding.

    Args:
        used: the highest token id in the data.

    Raises:
        UserError: `used` is not below the vocabulary's size.
    """
    size = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    if size is not None and used >= size:
        raise UserError(
            f"{model}: tokenizer: gives token id {used} ({tokenizer.convert_ids_to_tokens(used)!r}), "
            f"the model has {size} embeddings; it is not this model's tokenizer"
        )


def fingerprint(model: str) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of all tensors in the checkpoint's safetensors files."""
    files = _checkpoint_files(model)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        lines = sorted(pool.map(lambda named: _tensor_line(*named), _tensors(files)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                yield file, name


def _tensor_line(file: Path, name: str) -> str:
    with safe_open(file, framework="pt") as tensors:
        tensor = tensors.get_tensor(name)
    content = tensor.contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else b""
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def _checkpoint_files(model: str) -> list[Path]:
    def find(name: str) -> Path | None:
        found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    single = find(SINGLE)
    if single is not None:
        return [single]
    index = find(INDEX)
    if index is None:
        raise UserError(f"{model}: no {SINGLE} and no {INDEX}; only safetensors checkpoints are loaded")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path for name in names if (path := find(name)) is not None]


def _loading(model: str, what: str, load: Any) -> Any:
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError, StrictDataclassError) as error:
        raise UserError(f"{model}: {what}: {first_line(error)}") from None
