"""Loads a checkpoint's tensors straight into the stock model: one copy of the weights, one pass over the files.

The result equals that of `from_pretrained` wherever stored tensors match the model's parameters by name, nearly always.
Other checkpoints (weights to be merged, renamed, dequantised) are declined with `NeedsTransformersLoader`.
"""

import copy
import functools
import mmap
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cecompile.errors import UserError, first_line
from cecompile.model.safetensors_reader import Checkpoint, StoredTensor, read_header, stream
from cecompile.model.structure import LayerRange

SWITCH = 1e-4  # seconds after which Python code yields to the reading thread; Python's default is 50 times as long
HUGE = 4 * 2**20  # smallest tensor in bytes for which huge pages, usually of 2 MiB, are worth asking for

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_UNUSUAL = ("quantization_config", "fusion_config", "transformers_weights", "extra_files", "sub_configs")

WhileReading = Callable[[PreTrainedModel], object]


class NeedsTransformersLoader(Exception):  # noqa: N818  (nothing is wrong)
    """Loading this checkpoint takes more than copying tensors by their names; the text gives the reason."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """The result `made` while tensors were read, and the ends of both by `time.perf_counter()`."""

    made: Any
    read_at: float
    made_at: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready for inference.

    Attributes:
        checkpoint: tensors and digests of the checkpoint's files.
        fallback: why `from_pretrained` loaded the model; None where tensors were copied by their names.
        sources: by the first name of each loaded parameter and persistent buffer, indices into the checkpoint's
            tensors: one, or several for tied weights. Empty after a fallback.
        left: like `sources`, for parameters and buffers that were not loaded.
        overlap: result and times of `while_reading`.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    fallback: str | None = None
    sources: Mapping[str, Sequence[int]] = field(default_factory=dict)
    left: Mapping[str, Sequence[int]] = field(default_factory=dict)
    overlap: Overlap | None = None


def load_plainly(
    model: str, config: Any, dtype: torch.dtype | None, device: torch.device, files: Sequence[Path],
    share: LayerRange | None = None, read_all: bool = True, keep_cached: bool = False,
    while_reading: WhileReading | None = None,
) -> Loaded:  # fmt: skip
    """The stock model on `device`, bit for bit equal to the model that `from_pretrained` loads.

    Args:
        model: the model's `name_or_path`, also named in errors.
        dtype: the parameters' dtype; None is the checkpoint's.
        files: all safetensors files of the checkpoint.
        share: the part to load; the rest stays on the meta device. None loads all.
        read_all: read all tensors, for the fingerprint. Otherwise only the loaded tensors are read; the share that
            begins the model also reads tensors that belong to no parameter.
        keep_cached: see `stream`.
        while_reading: called with the model while a thread reads the weights.

    Raises:
        NeedsTransformersLoader: only `from_pretrained` can load this checkpoint.
        UserError: a file is damaged, or a weight is missing or has another shape.
        torch.OutOfMemoryError: the parameters do not fit.
    """
    tensors = [tensor for file in files for tensor in read_header(model, file)]
    network = _skeleton(model, config, _parameter_dtype(config, dtype, files, tensors))
    _check_renaming(network, tensors)
    sources = _match(model, network, tensors)
    absent = set() if share is None else share.absent(network)
    others = set(range(len(tensors))).difference(*sources.values()) if share is None or share.first == 0 else set()
    expected = network.state_dict(keep_vars=True)
    left = {name: sources.pop(name) for name in [*sources] if id(expected[name]) in absent}
    targets = _allocate(network, sources, device, absent)
    only = None if read_all else others.union(*sources.values())
    network.eval().requires_grad_(False)
    read = functools.partial(stream, model, tensors, targets, device, only, keep_cached)
    make = None if while_reading is None else functools.partial(while_reading, network)
    checkpoint, overlap = (read(), None) if make is None else _read_overlapped(read, make, device)
    for indices in sources.values():
        if len({(tensors[i].dtype, checkpoint.digests[i]) for i in indices}) > 1:
            first, second, *_ = (tensors[i].name for i in indices)
            raise NeedsTransformersLoader(f"{first} and {second} are tied and differ")
    return Loaded(network, checkpoint, sources=sources, left=left, overlap=overlap)


def tie_head(network: PreTrainedModel) -> str | None:
    """Ties what the configuration says is tied. Returns a note if the checkpoint has another head, else None."""
    head = network.get_output_embeddings()
    stored = getattr(head, "weight", None)
    network.tie_weights()
    if stored is None or head.weight is stored or torch.equal(head.weight, stored):
        return None
    return "the checkpoint's head is not used: its configuration ties the head to the embedding, as lm_eval does"


def _read_overlapped(
    read: Callable[..., Checkpoint], make: Callable[[], object], device: torch.device
) -> tuple[Checkpoint, Overlap]:
    """Calls `read` on a thread, and `make` on the caller's thread."""
    given_up = threading.Event()

    def in_thread() -> tuple[Checkpoint, float]:
        if device.type == "cuda":  # each thread has its own current device
            torch.cuda.set_device(device)
        return read(given_up=given_up), time.perf_counter()

    interval = sys.getswitchinterval()
    with ThreadPoolExecutor(1, "load") as thread:
        reading = thread.submit(in_thread)
        try:
            sys.setswitchinterval(SWITCH)
            made, made_at = make(), time.perf_counter()
            checkpoint, read_at = reading.result()
        except BaseException:
            given_up.set()
            raise
        finally:
            sys.setswitchinterval(interval)
    return checkpoint, Overlap(made, read_at, made_at)


def _parameter_dtype(
    config: Any, dtype: torch.dtype | None, files: Sequence[Path], tensors: Sequence[StoredTensor]
) -> torch.dtype:
    """The dtype in which `from_pretrained` would load. Raises NeedsTransformersLoader."""
    unusual = [name for name in _UNUSUAL if getattr(config, name, None)]
    if unusual:
        raise NeedsTransformersLoader(f"the config has {unusual[0]}")
    if not tensors or len({tensor.name for tensor in tensors}) < len(tensors):
        raise NeedsTransformersLoader("a tensor is stored twice" if tensors else "nothing is stored")
    dtype = dtype or config.dtype
    if dtype is None and len(files) == len({tensor.dtype for tensor in tensors}) == 1:
        dtype = tensors[0].dtype
    if dtype not in _FLOATS:
        raise NeedsTransformersLoader(f"the dtype to load as is {dtype}")
    return dtype


def _skeleton(model: str, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters and persistent buffers on the meta device, and its other buffers on the CPU.

    As in `from_pretrained`, the model's own initialisation makes the other buffers, and skips initialised tensors.
    """
    config = copy.deepcopy(config)
    config.name_or_path, config.dtype = model, dtype
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        network.tie_weights()  # older versions do not on the meta device
        for tensor in network.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        for module in network.modules():
            vars(module).pop("_is_hf_initialized", None)
            for name in module._non_persistent_buffers_set:
                if module._buffers[name] is not None:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        network.initialize_weights()
    except Exception as error:  # from_pretrained copes with the fault or reports it
        raise NeedsTransformersLoader(f"it cannot be built without memory: {first_line(error)}") from None
    odd = [name for name, tensor in network.state_dict().items() if tensor.dtype != dtype]
    for kept in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        odd += getattr(network, kept, None) or ()
    if odd:
        raise NeedsTransformersLoader(f"{odd[0]} keeps a dtype of its own")
    return network


def _check_renaming(network: PreTrainedModel, tensors: Sequence[StoredTensor]) -> None:
    """Declines tensors that transformers renames, merges or splits on loading."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        for rule in get_model_conversion_mapping(network):
            for tensor in tensors:
                if rule.rename_source_key(tensor.name) != (tensor.name, None):
                    raise NeedsTransformersLoader(f"transformers converts {tensor.name}")
    except (ImportError, AttributeError, TypeError) as error:  # no public interface
        reason = f"this version of transformers does not say what it converts: {first_line(error)}"
        raise NeedsTransformersLoader(reason) from None


def _match(model: str, network: PreTrainedModel, tensors: Sequence[StoredTensor]) -> dict[str, list[int]]:
    """The stored tensors of the model's parameters and persistent buffers: see `Loaded.sources`."""
    expected = network.state_dict(keep_vars=True)
    first_names = _first_names(network, expected)
    prefix = f"{network.base_model_prefix}."
    sources: dict[str, list[int]] = defaultdict(list)
    unexpected = False
    for index, tensor in enumerate(tensors):
        names = {tensor.name, tensor.name.removeprefix(prefix), prefix + tensor.name} & expected.keys()
        if len(names) > 1:
            raise NeedsTransformersLoader(f"{tensor.name} can be more than one parameter")
        if not names:
            unexpected = True
            continue
        if tensor.dtype not in _FLOATS or not tensor.aligned:
            unaligned = "" if tensor.aligned else ", unaligned"
            raise NeedsTransformersLoader(f"{tensor.name} is stored as {tensor.dtype}{unaligned}")
        (name,) = names
        if tensor.shape != expected[name].shape:
            stored, wanted = f"{tensor.name} in {tensor.file.name} is of shape", tuple(expected[name].shape)
            raise UserError(f"{model}: weights: {stored} {tensor.shape}, the model's is {wanted}")
        sources[first_names[name]].append(index)
    missing = sorted(set(first_names.values()) - sources.keys())
    if missing and (unexpected or getattr(network, "_keys_to_ignore_on_load_missing", True)):
        raise NeedsTransformersLoader(f"{missing[0]} is missing, or goes by another name")
    if missing:
        raise UserError(f"{model}: weights: {len(missing)} missing keys, such as {missing[0]}")
    return dict(sources)


def _first_names(network: PreTrainedModel, expected: dict[str, torch.Tensor]) -> dict[str, str]:
    """For every name, the first name of the same parameter. Declines parameters that are shared but not tied."""
    tied = getattr(network, "all_tied_weights_keys", None)
    if tied is None:
        raise NeedsTransformersLoader("this version of transformers does not say what it ties")
    by_tensor: dict[int, str] = {}
    first_names = {name: by_tensor.setdefault(id(tensor), name) for name, tensor in expected.items()}
    for name, first in first_names.items():
        if name != first and not {name, first} <= tied.keys() | set(tied.values()):
            raise NeedsTransformersLoader(f"{name} and {first} are one parameter")
    for target, source in tied.items():
        if expected.get(target) is not expected.get(source):
            raise NeedsTransformersLoader(f"{target} and {source} are not one parameter")
    return first_names


def _allocate(
    network: PreTrainedModel, sources: dict[str, list[int]], device: torch.device, absent: Collection[int]
) -> dict[int, torch.Tensor]:
    """Allocates every parameter on `device`, and moves the other buffers there. Tied tensors stay tied.

    Tensors whose `id` is in `absent` stay where they are. Returns the tensors to fill, by the stored tensor's index.
    """
    expected = network.state_dict(keep_vars=True)
    made: dict[int, torch.Tensor] = {}
    targets: dict[int, torch.Tensor] = {}
    for name, indices in sources.items():
        old = expected[name]
        targets[indices[0]] = empty = _empty(old.shape, old.dtype, device)
        made[id(old)] = nn.Parameter(empty, requires_grad=False) if isinstance(old, nn.Parameter) else empty
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in absent:
                    held[name] = made[id(tensor)] if id(tensor) in made else tensor.to(device)
    return targets


def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Like `torch.empty`; on the CPU in huge pages if the system has them.

    Touching fresh memory in small pages takes longer than reading the file.
    """
    size = shape.numel() * dtype.itemsize
    if device.type != "cpu" or size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
