"""Loading a checkpoint unchanged, and its fingerprint."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from cecompile.errors import UserError, first_line
from cecompile.model.load import Loaded, NeedsTransformersLoader, WhileReading, load_plainly
from cecompile.model.prefetch import INDEX, SINGLE
from cecompile.model.safetensors_reader import Checkpoint, read_header, stream
from cecompile.model.structure import LayerRange

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is not None and layers < 1:  # which transformers would make a model of
        raise UserError(f"{model}: config.json: num_hidden_layers is {layers}")
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
    """What `load_checkpoint` loads, without the fingerprint."""
    return load_checkpoint(model, config, dtype, device).model


def load_checkpoint(
    model: str, config: Any, dtype: str, device: torch.device, share: LayerRange | None = None, read_all: bool = True,
    keep_cached: bool = False, while_reading: WhileReading | None = None,
) -> Loaded:  # fmt: skip
    """The stock model with the checkpoint's weights, on `device`, for inference, and the checkpoint's fingerprint.

    Args:
        model: a directory or a hub id with safetensors files.
        config: what `load_config` returned.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: where to.
        share, read_all, keep_cached, meanwhile: see `load_plainly`.

    Raises:
        UserError: files are missing or damaged, or weights are missing from them; or only `from_pretrained` can load
            them, which loads no share.
        torch.OutOfMemoryError: the weights do not fit on the device.
    """
    try:
        files = _loading(model, "weights", lambda: _plain_files(model))
        with _quiet_transformers():
            loaded = load_plainly(
                model, config, DTYPES.get(dtype), device, files, share, read_all, keep_cached, while_reading
            )
            _loading(model, "generation config", lambda: _set_generation_config(loaded.model, model))
        return loaded
    except NeedsTransformersLoader as error:
        reason = str(error)
        if share is not None:
            raise UserError(f"{model}: weights: cannot be loaded in parts: {reason}") from None
    # out of the handler, so that nothing of the attempt is held
    if while_reading is not None:  # may have compiled modules, which hold themselves
        gc.collect()
    return Loaded(_load_by_transformers(model, config, dtype, device), read_checkpoint(model), reason)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its report of missing weights is ours to make."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_generation_config(model: str, config: Any) -> GenerationConfig:
    """The model's generation config, from its file, else from its configuration.

    Raises:
        UserError: the file cannot be read.
    """
    return _loading(model, "generation config", lambda: _generation_config(model, config))


def _generation_config(model: str, config: Any) -> GenerationConfig:
    with suppress(OSError):
        return GenerationConfig.from_pretrained(model)
    return GenerationConfig.from_model_config(config)


def _set_generation_config(loaded: PreTrainedModel, model: str) -> None:
    if loaded.can_generate():
        loaded.generation_config = _generation_config(model, loaded.config)


def _load_by_transformers(model: str, config: Any, dtype: str, device: torch.device) -> PreTrainedModel:
    with _quiet_transformers():
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
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of all tensors in the checkpoint's safetensors files.

    Raises:
        UserError: there are no such files, or they cannot be read.
    """
    return read_checkpoint(model).fingerprint


def read_checkpoint(model: str) -> Checkpoint:
    """Reads all tensors in the checkpoint's safetensors files, and keeps none. Raises: see `fingerprint`."""
    files = _checkpoint_files(model)
    if not files:
        raise UserError(f"{model}: no {SINGLE} and no {INDEX}; only safetensors checkpoints are loaded")
    tensors = [tensor for file in files for tensor in read_header(model, file)]
    return stream(model, tensors, {}, torch.device("cpu"))


def checkpoint_files(model: str) -> list[Path]:
    """The checkpoint's safetensors files; empty if it has none. Raises UserError: they cannot be found."""
    files: list[Path] = _loading(model, "weights", lambda: _checkpoint_files(model))
    return files


def _plain_files(model: str) -> list[Path]:
    """The checkpoint's files.

    Raises:
        NotPlain: there are none, or they are not all there is to the weights.
    """
    if _find(model, "adapter_config.json") is not None:
        raise NeedsTransformersLoader("it is an adapter")
    if any(Path(model).glob("shard-*.safetensors")):
        raise NeedsTransformersLoader("it is a distributed checkpoint")
    files = _checkpoint_files(model)
    if not files:
        raise NeedsTransformersLoader(f"it has no {SINGLE} and no {INDEX}")
    return files


def _checkpoint_files(model: str) -> list[Path]:
    """The checkpoint's safetensors files, in the order of their names; empty if it has none.

    Raises:
        UserError: a file that the index names is not there, or the index cannot be read.
    """
    single = _find(model, SINGLE)
    if single is not None:
        return [single]
    index = _find(model, INDEX)
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{model}: weights: {INDEX}: not an index: {type(error).__name__}: {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{model}: weights: {INDEX}: names {name!r}, which is not a file beside it")
    found = {name: _find(model, name) for name in names}
    for name, path in found.items():
        if path is None:
            raise UserError(f"{model}: weights: no {name}, which {INDEX} names")
    return [path for path in found.values() if path is not None]


def _find(model: str, name: str) -> Path | None:
    found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _loading(model: str, what: str, load: Any) -> Any:
    try:
        return load()
    except (torch.OutOfMemoryError, UserError, NeedsTransformersLoader):
        raise
    except Exception as error:  # damaged files make their readers raise errors of every kind
        raise UserError(f"{model}: {what}: {first_line(error)}") from None
