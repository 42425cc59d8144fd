"""The parts of a model: a run of its layers, and the modules that are compiled."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cecompile.engine.head import Readout
from cecompile.errors import UserError
from cecompile.model.structure import decoder_layers, kinds_of, norms_beside, returns_pair


class CannotCompileError(Exception):
    """Nothing can be compiled here, for the reason in the message."""


class Part:
    """A run of a model's layers, here all layers. Hidden states come from the part before and go to the part after.

    `ends` is True where the model's last layer is in this part.
    """

    ends = True

    def __init__(self, model: PreTrainedModel) -> None:
        self._decoder = model.base_model

    def reserve(self, slots: int) -> None:
        """Allocates the buffers for passes of up to `slots` tokens."""

    def receive(self, shape: Sequence[int]) -> None:
        """Waits for the hidden states of (rows, length) tokens from the part before."""

    def send(self, shape: Sequence[int]) -> None:
        """Sends the hidden states computed last, of (rows, length) tokens, to the part after."""

    def trial(self, token_ids: Tensor) -> Tensor:
        """The hidden states of `__call__`, computed from zeros instead of received hidden states."""
        return self(token_ids)

    def __call__(self, token_ids: Tensor, **arguments: Any) -> Tensor:
        """The part's hidden states, (rows, length, width), computed from the received hidden states.

        `token_ids` are (rows, length) int64; `arguments` are the decoder's, beside the tokens.
        """
        return self._decoder(input_ids=token_ids, use_cache=False, **arguments).last_hidden_state


def compiled_parts(model: PreTrainedModel) -> list[nn.Module]:
    """The modules to compile: decoder layers, then the norms outside the layers that torch has no operator for."""
    return decoder_layers(model) + [m for m in norms_beside(model) if not type(m).__module__.startswith("torch.")]


def compile_modules(modules: Sequence[nn.Module], readout: Readout, options: dict[str, Any]) -> Readout:
    """Sets each module's call to compiled code, and returns the compiled `readout`.

    Code is compiled when first called. Modules that differ in their weights alone share one graph per shape.
    """
    for module in modules:
        module.compile(fullgraph=True, dynamic=False, options=options)
    return torch.compile(readout, fullgraph=True, dynamic=False, options=options)


def compile_options(model: PreTrainedModel, inputs_free: bool) -> dict[str, Any]:
    """Inductor options for compiling the model's modules on its device.

    Raises:
        CannotCompileError: this version of torch lacks one of the options, or Python runs without `assert`.
    """
    if sys.flags.optimize:  # torch 2.13's Inductor then leaves out a part of an index in some loops
        raise CannotCompileError(
            "torch's compiler needs Python's assert statements; unset PYTHONOPTIMIZE, leave out -O"
        )
    if model.device.type == "cuda":  # imported here: both import Inductor, which an uncompiled run does without
        from cecompile.engine import inductor_cuda

        options = inductor_cuda.compile_options(inputs_free)
    else:
        from cecompile.engine import inductor_cpu

        options = inductor_cpu.compile_options(model)
    missing = sorted(options.keys() - set(torch._inductor.list_options()))
    if missing:
        raise CannotCompileError(f"torch {torch.__version__} has no Inductor option {', '.join(missing)}")
    return options


@contextmanager
def one_layer_of_each_kind(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, all decoder layers but the first of each kind pass their input through.

    One pass then compiles all code, or loads the code, at the cost of those layers. Every layer runs where the layers
    are of too many kinds.
    """
    layers = decoder_layers(model)
    kinds = list(range(len(layers)))
    with suppress(UserError):
        kinds = kinds_of(model)
    left_out = [layer for i, layer in enumerate(layers) if kinds.index(kinds[i]) < i]
    calls = [layer._compiled_call_impl for layer in left_out]
    for layer in left_out:
        layer._compiled_call_impl = functools.partial(_pass_through, returns_pair(layer))
    try:
        yield
    finally:
        for layer, call in zip(left_out, calls, strict=True):
            layer._compiled_call_impl = call


def _pass_through(pair: bool, *arguments: Any, **named: Any) -> Any:
    hidden = (*arguments, *named.values())[0]  # its name differs between architectures
    return (hidden, None) if pair else hidden


@torch.inference_mode()
def inputs_are_free(model: PreTrainedModel, run: Callable[[Tensor], Tensor] | None = None) -> bool:
    """Whether a decoder layer may overwrite its input: no later module reads it.

    A trial on a few tokens decides: each layer's input is filled with NaN once the layer is done, and the model's
    output must stay finite. `run` runs the model's layers on token ids; None runs the whole model.
    """
    run = run or Part(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    poisoned = 0

    def poison(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal poisoned
        hidden: Tensor = (*args, *kwargs.values())[0]  # its name differs between architectures
        if hidden.untyped_storage().data_ptr() not in weights:
            hidden.fill_(torch.nan)
            poisoned += 1

    layers, attention = decoder_layers(model), model.config._attn_implementation
    hooks = [layer.register_forward_hook(poison, with_kwargs=True) for layer in layers]
    model.set_attn_implementation("eager")
    try:
        hidden = run(torch.zeros(1, 8, dtype=torch.long, device=model.device))
    finally:
        model.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()
    return poisoned == len(layers) and bool(hidden.isfinite().all())
