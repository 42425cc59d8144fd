"""Loads a model, its configuration and its tokenizer from a directory or the hub, all unchanged."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from cecompile.errors import UserError, file_errors, first_line
from cecompile.model.load import Loaded, NeedsTransformersLoader, WhileReading, load_plainly
from cecompile.model.prefetch import INDEX, SINGLE
from cecompile.model.safetensors_reader import Checkpoint, read_header, stream
from cecompile.model.structure import LayerRange

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(model: str) -> Any:
    """The model's configuration. Raises UserError: no configuration loads, or the model is not decoder-only."""
    path = Path(model)
    with file_errors(f"{model}: cannot be read"):
        there, no_config = path.exists(), path.is_dir() and not (path / "config.json").is_file()
    if no_config:
        raise UserError(f"{model}: no config.json in this directory")
    if not there and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"{model}: no such directory")
    with _one_line(model, "config.json"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is not None and layers < 1:  # which transformers would make a model of
        raise UserError(f"{model}: config.json: num_hidden_layers is {layers}")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model}: {config.model_type} is an encoder-decoder model; decoder-only models are scored")
    return config


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer. Raises UserError: no tokenizer can be loaded."""
    with _one_line(model, "tokenizer"):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def load_generation_config(model: str, config: Any) -> GenerationConfig:
    """The model's generation config, from its file, else from `config`. Raises UserError: the file cannot be read."""
    with _one_line(model, "generation config"):
        with suppress(OSError):
            return GenerationConfig.from_pretrained(model)
        return GenerationConfig.from_model_config(config)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' report of missing weights, because this module reports missing weights itself."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@_quiet_transformers()
def load_checkpoint(
    model: str, config: Any, dtype: str, device: torch.device, share: LayerRange | None = None, read_all: bool = True,
    keep_cached: bool = False, while_reading: WhileReading | None = None,
) -> Loaded:  # fmt: skip
    """The stock model with the checkpoint's weights, on `device`, for inference.

    Args:
        model: a directory or a hub id with safetensors files.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        share, read_all, keep_cached, while_reading: see `load_plainly`.

    Raises:
        UserError: a file is missing or damaged; a weight is missing; or a share is asked for, and only
            `from_pretrained` can load the checkpoint.
        torch.OutOfMemoryError: the weights do not fit on the device.
    """
    try:
        files, how = _plain_files(model), (share, read_all, keep_cached, while_reading)
        loaded = load_plainly(model, config, DTYPES.get(dtype), device, files, *how)
        if loaded.model.can_generate():
            loaded.model.generation_config = load_generation_config(model, loaded.model.config)
        return loaded
    except NeedsTransformersLoader as error:
        reason = str(error)
        if share is not None:
            raise UserError(f"{model}: weights: cannot be loaded in parts: {reason}") from None
    # outside of the handler, so that the handler keeps nothing of the attempt alive
    if while_reading is not None:  # may have compiled modules, which are in reference cycles
        gc.collect()
    with _one_line(model, "weights"):
        options: dict[str, Any] = {"config": config, "dtype": DTYPES.get(dtype, "auto"), "use_safetensors": True}
        options |= {"trust_remote_code": False, "output_loading_info": True}
        network, info = AutoModelForCausalLM.from_pretrained(model, **options)
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            example = min(map(str, info[kind]))
            raise UserError(f"{model}: weights: {len(info[kind])} {kind.replace('_', ' ')}, such as {example}")
    return Loaded(network.eval().requires_grad_(False).to(device), read_checkpoint(model), reason)


def check_vocabulary(model: str, tokenizer: Any, config: Any, used: int) -> None:
    """Raises UserError if `used`, the highest token id in the data, is not below the vocabulary's size."""
    size = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    if size is not None and used >= size:
        given = f"gives token id {used} ({tokenizer.convert_ids_to_tokens(used)!r})"
        reason = f"the model has {size} embeddings; it is not this model's tokenizer"
        raise UserError(f"{model}: tokenizer: {given}, {reason}")


def read_checkpoint(model: str) -> Checkpoint:
    """Reads all of the checkpoint's tensors for their digests. Raises UserError: a file is missing or damaged."""
    files = checkpoint_files(model)
    if not files:
        raise UserError(f"{model}: no {SINGLE} and no {INDEX}; only safetensors checkpoints are loaded")
    tensors = [tensor for file in files for tensor in read_header(model, file)]
    return stream(model, tensors, {}, torch.device("cpu"))


def _plain_files(model: str) -> list[Path]:
    """The checkpoint's files. Raises NeedsTransformersLoader: the weights are not in safetensors files alone."""
    if _find(model, "adapter_config.json") is not None:
        raise NeedsTransformersLoader("it is an adapter")
    if any(Path(model).glob("shard-*.safetensors")):
        raise NeedsTransformersLoader("it is a distributed checkpoint")
    files = checkpoint_files(model)
    if not files:
        raise NeedsTransformersLoader(f"it has no {SINGLE} and no {INDEX}")
    return files


def checkpoint_files(model: str) -> list[Path]:
    """The checkpoint's safetensors files, sorted by their names; possibly none.

    Raises UserError: a file that the index names is missing, or the index cannot be read.
    """
    single = _find(model, SINGLE)
    if single is not None:
        return [single]
    index = _find(model, INDEX)
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{model}: weights: {INDEX}: not an index: {type(error).__name__}: {error}") from None
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{model}: weights: {INDEX}: names {name!r}, which is not a file beside it")
        file = _find(model, name)
        if file is None:
            raise UserError(f"{model}: weights: no {name}, which {INDEX} names")
        files.append(file)
    return files


def _find(model: str, name: str) -> Path | None:
    with _one_line(model, "weights"):
        found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


@contextmanager
def _one_line(model: str, part: str) -> Iterator[None]:
    """Turns any error that a reader raises into one line."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # damaged files make their readers raise errors of every kind
        raise UserError(f"{model}: {part}: {first_line(error)}") from None
