"""Compiling for the CPU: linear layers through oneDNN, and a C++ compiler in any directory.

Inductor sends float32 matrix products to MKL. With few rows and a wide output, oneDNN's inner product is faster on
weights as they lie: 128 to 512 rows of 256 by 32,000 ran at 1.5 to 2 times MKL's rate on two cores of an AMD EPYC with
AVX-512 (torch 2.13). So a pass over the graph being compiled replaces the products. Both compute in float32.
"""

import contextlib
import functools
import inspect
import logging
import shlex
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

aten = torch.ops.aten

# Inductor imports this to find a C++ compiler, and a torch built for CUDA then warns on a machine without a GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: not record.getMessage().startswith("No CUDA runtime is found")
)


@torch.library.custom_op("cecompile::linear", mutates_args=())
def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of rows (n, k) and weight (m, k) transposed, plus bias (m,): (n, m) float32, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def compile_options(model: Any) -> dict[str, Any]:
    """Inductor options for compiling `model`'s layers and head. Also quotes paths, as `quote_paths` does."""
    quote_paths()
    on_cpu = model.device.type == "cpu" and model.dtype == torch.float32
    if on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return {"post_grad_custom_pre_pass": _LINEAR_THROUGH_ONEDNN}
    return {}


class LinearThroughOneDnn(CustomGraphPass):
    """Replaces x @ w.T (+ bias) in float32 by oneDNN's linear operator."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            arguments: list[Any] = list(node.args)
            if node.target is aten.mm.default:
                arguments.insert(0, None)
            elif node.target is not aten.addmm.default or node.kwargs:
                continue
            bias, rows, transposed = arguments
            weight = _untransposed(transposed)
            if weight is None or (bias is not None and bias.meta["val"].dim() != 1):
                continue
            with graph.inserting_before(node):
                ours = graph.call_function(torch.ops.cecompile.linear.default, (rows, weight, bias))
            ours.meta.update(node.meta)
            node.replace_all_uses_with(ours)
            graph.erase_node(node)

    def uuid(self) -> str:
        """The name of the pass in Inductor's caches."""
        return "cecompile.LinearThroughOneDnn.1"


_LINEAR_THROUGH_ONEDNN = LinearThroughOneDnn()  # one object: Dynamo compares options by identity


def _untransposed(node: Node) -> Any:
    """The node of w, if `node` is w transposed and w is a contiguous float32 matrix; else None."""
    if node.op != "call_function" or node.target not in (aten.permute.default, aten.t.default):
        return None
    weight, *order = node.args
    if order not in ([], [[1, 0]]) or not isinstance(weight, Node):
        return None
    value = weight.meta["val"]
    fits = value.dim() == 2 and value.dtype == torch.float32 and value.is_contiguous()
    return weight if fits else None


@functools.cache
def quote_paths() -> None:
    """Makes this process quote, from now on, all paths that Inductor passes to a C++ compiler.

    Inductor joins and splits each command line. Some versions of torch do not quote all paths in between (2.8
    quotes headers only), so nothing compiles where torch or the compiled code is in a directory with a space.
    """
    try:
        from torch._inductor.cpp_builder import CppBuilder  # slow to import
    except ImportError:  # another version's name
        return
    make = CppBuilder.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_and_quote(*args: Any, **kwargs: Any) -> None:
        make(*args, **kwargs)
        with contextlib.suppress(AttributeError, KeyError):  # a builder of another form is left as it is
            _quote_in(args[0], signature.bind(*args, **kwargs).arguments)

    CppBuilder.__init__ = make_and_quote  # type: ignore[method-assign]


def _quote_in(builder: Any, given: dict[str, Any]) -> None:
    """Quotes the paths in a builder's parts of the command line; `given` are the builder's own arguments."""
    sources, options = given["sources"], given["BuildOption"]
    header = getattr(options, "precompiled_header", None)
    for name, paths in (
        ("_sources_args", [sources] if isinstance(sources, str) else sources),
        ("_include_dirs_args", [header] if header else []),
        ("_libraries_dirs_args", options.get_libraries_dirs()),
        ("_output", [builder.get_target_file_path()]),
    ):
        arguments: str = getattr(builder, name)
        for path in map(str, paths):
            safe = shlex.quote(path)
            if safe not in arguments:
                arguments = arguments.replace(path, safe)
        setattr(builder, name, arguments)
