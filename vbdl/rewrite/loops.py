"""Element-wise operations on a transposed product, done before the transposition.

A linear layer's rows are the columns of its product (`vbdl/rewrite/linear.py`), and the next layer's product takes them
so. What comes between, a bias and an activation, is traced on the transposed view; compiled as it stands, Inductor
writes its result in the view's order, and two blocks of every layer are transposed in passing. Here the view is taken
last: transpositions meet and vanish, and the loops run along memory. Every value is computed by the same operations.
"""

from typing import Any

import torch
from torch import Tensor, fx

_TRANSPOSE = torch.ops.aten.transpose.int
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.expand.default, torch.ops.aten.reshape.default)


def transpose_last(traced: fx.GraphModule) -> None:
    """Rewrite a traced call in place. Its values carry `meta["val"]`, as make_fx leaves them."""
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not all(isinstance(n.meta.get("val"), Tensor) for n in _around(node)):
            continue
        if node.target in _RESHAPES and node.args[0].meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(node.args[0])  # a reshape to the shape that it has
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()) and _is_transposed_throughout(node):
            with graph.inserting_before(node):
                args = fx.node.map_arg(node.args, lambda n: _transposed(graph, n))
                kwargs = fx.node.map_arg(node.kwargs, lambda n: _transposed(graph, n))
                inner: Any = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
                inner.meta["val"] = node.meta["val"].mT
                node.replace_all_uses_with(_transposed(graph, inner))
    graph.eliminate_dead_code()
    traced.recompile()


def _around(node: fx.Node) -> list[fx.Node]:
    return [node, *node.all_input_nodes]


def _is_transposed_throughout(node: fx.Node) -> bool:
    """Whether all of the result's shape is a transposed view of what lies in order, and the result lies so too: then no
    value changes its place in memory, which views of it may depend on."""
    whole = [n for n in _around(node) if n.meta["val"].shape == node.meta["val"].shape]
    views = [_is_transposed(n) for n in whole if n is not node]
    return bool(views) and all(views) and all(n.meta["val"].mT.is_contiguous() for n in whole)


def _is_transposed(node: fx.Node) -> bool:
    return node.target is _TRANSPOSE and set(node.args[1:]) == {-1, -2}


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The last two axes of a value exchanged; a value of one axis gets a second, of length one."""
    value = node.meta["val"]
    if _is_transposed(node):
        return node.args[0]  # type: ignore[return-value]
    if value.ndim == 0:
        return node
    if value.ndim == 1:
        found = graph.call_function(torch.ops.aten.unsqueeze.default, (node, -1))
        found.meta["val"] = value.unsqueeze(-1)
    else:
        found = graph.call_function(_TRANSPOSE, (node, -2, -1))
        found.meta["val"] = value.mT
    return found
