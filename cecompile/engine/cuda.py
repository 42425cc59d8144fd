"""Compiling for CUDA: a matrix product that ends in a residual addition adds in its own epilogue.

`x + down(...)` as Inductor compiles it writes the product to memory, and a kernel of its own reads it and the residual
back and writes the sum. cuBLAS can add to what the output buffer holds already, before it rounds; so where the
residual is a buffer of this graph that nothing reads any more, the product is accumulated into it. That leaves out a
pass over memory per layer, and one rounding.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_FRESH = (aten.add.Tensor, aten.mm.default, aten.addmm.default)  # their results are buffers of the graph's own


def compile_options(model: Any) -> dict[str, Any]:
    """Inductor options for compiling `model`'s layers and head."""
    return {"post_grad_custom_post_pass": _ACCUMULATE}


class AccumulateIntoResidual(CustomGraphPass):
    """Exchanges residual + a @ b for an in-place product into the residual, where that changes nobody's input."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(a, Node) for a in node.args):
                continue
            for residual, added in (node.args, node.args[::-1]):
                product = _behind_views(added)
                if _is_product(added) and _may_overwrite(residual, product, node):
                    _accumulate(graph, node, residual, product)
                    break
        graph.eliminate_dead_code()

    def uuid(self) -> str:
        """Identifies the pass in Inductor's caches."""
        return "cecompile.AccumulateIntoResidual.1"


_ACCUMULATE = AccumulateIntoResidual()  # one object: Dynamo takes options apart by identity


def _accumulate(graph: Graph, node: Node, residual: Node, product: Node) -> None:
    """Puts the in-place product before `node`, whose users read the residual's buffer instead."""
    with graph.inserting_before(node):
        rows = graph.call_function(aten.reshape.default, (residual, list(product.meta["val"].shape)))
        rows.meta["val"] = product.meta["val"]
        into = graph.call_function(aten.addmm_.default, (rows, *product.args))
        into.meta.update(product.meta)
    node.replace_all_uses_with(residual)
    graph.erase_node(node)


def _behind_views(node: Node) -> Node:
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_product(node: Node) -> bool:
    """Whether this is a product without bias, or a view of one, and nothing else reads either."""
    while len(node.users) == 1 and node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return len(node.users) == 1 and node.target is aten.mm.default


def _may_overwrite(residual: Node, product: Node, addition: Node) -> bool:
    """Whether `product` may be added to `residual` in place: same layout, a buffer of the graph, and read before."""
    base = _behind_views(residual)
    value, added = residual.meta["val"], product.meta["val"]
    if base.target not in _FRESH or value.dtype != added.dtype or value.numel() != added.numel():
        return False
    if not value.is_contiguous() or value.shape[-1] != added.shape[-1] or value.shape != addition.meta["val"].shape:
        return False
    before = _ancestors(product)
    return all(user is addition or user in before for user in _readers(base))


def _readers(base: Node) -> set[Node]:
    """Who reads this buffer, through views too."""
    out: set[Node] = set()
    for user in base.users:
        out |= _readers(user) if user.target in _VIEWS else {user}
    return out


def _ancestors(node: Node) -> set[Node]:
    seen: set[Node] = set()
    open_nodes = [node]
    while open_nodes:
        for parent in open_nodes.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                open_nodes.append(parent)
    return seen
