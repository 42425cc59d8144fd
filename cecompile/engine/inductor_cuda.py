"""Compiling for CUDA: spares a decoder layer two passes over memory that Inductor's code makes.

- `x + down(...)` writes the product to memory, and another kernel reads both and writes the sum. cuBLAS can add to the
  contents of its output buffer before rounding. So a product is accumulated into the residual wherever no later
  operation reads the residual.
- FlexAttention's result has the layout of its query. Inductor lays the query out head by head, so the output projection
  needs a transposed copy. A query laid out token by token, as the model computes it, needs none.

Neither changes the arithmetic, but for one rounding less per residual.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_IN_PLACE = aten.addmm_.default
_FRESH = (aten.add.Tensor, aten.mm.default, aten.addmm.default)  # their results are the graph's own buffers


def compile_options(inputs_are_free: bool) -> dict[str, Any]:
    """Inductor options for compiling layers and head; `inputs_are_free` is the answer of `parts.inputs_are_free`."""
    options: dict[str, Any] = {"post_grad_custom_post_pass": _PASSES[inputs_are_free]}
    options["triton.autotune_pointwise"] = False  # the warm cache keeps no timings: each run would measure again
    if hasattr(torch._inductor.config, "deterministic"):  # without this option, timings decide how sums are taken
        options["deterministic"] = True
    return options


class FewerMemoryPasses(CustomGraphPass):
    """The pass over a graph being compiled that applies both changes."""

    def __init__(self, inputs_are_free: bool) -> None:
        self._inputs_are_free = inputs_are_free

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target is torch.ops.higher_order.flex_attention:
                _lay_out_by_token(graph, node)
        from torch._inductor import lowering  # slow to import, but loaded already whenever code is compiled

        if _IN_PLACE not in lowering.lowerings:  # Inductor would do the same, but fails where $CI is set
            lowering.make_fallback(_IN_PLACE, warn=False)
        _Accumulation(graph, self._inputs_are_free).apply()

    def uuid(self) -> str:
        """The name of the pass in Inductor's caches."""
        return f"cecompile.FewerMemoryPasses.1.{self._inputs_are_free}"


_PASSES = {free: FewerMemoryPasses(free) for free in (True, False)}  # Dynamo compares options by identity


def _lay_out_by_token(graph: Graph, attention: Node) -> None:
    query: Any = attention.args[0]
    value = query.meta["val"]  # (rows, heads, length, head size)
    _, heads, length, size = value.shape
    strides = (length * heads * size, size, heads * size, 1)
    with graph.inserting_before(attention):
        by_token = graph.call_function(torch.ops.prims.inductor_force_stride_order.default, (query, strides))
    by_token.meta["val"] = value.new_empty_strided(value.shape, strides)
    attention.args = (by_token, *attention.args[1:])


class _Accumulation:
    """Replaces residual + a @ b by an in-place product into the residual, where no other node reads the residual."""

    def __init__(self, graph: Graph, inputs_are_free: bool) -> None:
        self._graph = graph
        self._inputs_are_free = inputs_are_free
        self._place = {node: i for i, node in enumerate(graph.nodes)}
        self._writers: dict[Node, list[Node]] = {}  # the in-place products into a buffer

    def apply(self) -> None:
        for node in list(self._graph.nodes):
            if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(a, Node) for a in node.args):
                continue
            for residual, added in (node.args, node.args[::-1]):
                product = _behind_views(added)
                if _is_product(added) and self._may_overwrite(residual, product, node):
                    self._accumulate(node, residual, product)
                    break
        self._graph.eliminate_dead_code()

    def _accumulate(self, node: Node, residual: Node, product: Node) -> None:
        """Puts the in-place product before `node`, and makes the users of `node` read the residual's buffer."""
        with self._graph.inserting_before(node):
            rows = self._graph.call_function(aten.reshape.default, (residual, list(product.meta["val"].shape)))
            rows.meta["val"] = product.meta["val"]
            into = self._graph.call_function(_IN_PLACE, (rows, *product.args))
            into.meta.update(product.meta)
        self._place[rows] = self._place[into] = self._place[node]
        self._writers.setdefault(_behind_views(residual), []).append(into)
        node.replace_all_uses_with(residual)
        self._graph.erase_node(node)

    def _may_overwrite(self, residual: Node, product: Node, addition: Node) -> bool:
        """Whether the residual's buffer may be written, and all readers of the buffer run before `product`."""
        base, value, added = _behind_views(residual), residual.meta["val"], product.meta["val"]
        free = base.target in _FRESH or (self._inputs_are_free and base.op == "placeholder" and value.dim() == 3)
        same_rows = value.dtype == added.dtype and value.is_contiguous() and value.shape[-1] == added.shape[-1]
        if not free or not same_rows or value.shape != addition.meta["val"].shape:
            return False
        before = self._ancestors(product)
        return all(reader is addition or reader in before for reader in _readers(base))

    def _ancestors(self, node: Node) -> set[Node]:
        """The nodes that run before `node`: all inputs, also indirect, and the earlier writers of inputs' buffers."""
        seen: set[Node] = set()
        to_visit = [node]
        while to_visit:
            one = to_visit.pop()
            written = [w for p in one.all_input_nodes for w in self._writers.get(_behind_views(p), ())]
            for parent in [*one.all_input_nodes, *(w for w in written if self._place[w] <= self._place[one])]:
                if parent not in seen:
                    seen.add(parent)
                    to_visit.append(parent)
        return seen


def _is_product(node: Node) -> bool:
    """Whether `node` is a product without bias, or a view of such a product, and has one reader."""
    while len(node.users) == 1 and node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return len(node.users) == 1 and node.target is aten.mm.default


def _behind_views(node: Node) -> Node:
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _readers(base: Node) -> set[Node]:
    """The nodes that read a buffer, also through views."""
    out: set[Node] = set()
    for user in base.users:
        out |= _readers(user) if user.target in _VIEWS else {user}
    return out
