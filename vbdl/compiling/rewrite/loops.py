"""The rewrite that moves transpositions behind the operations on a transposed product.

A linear layer's rows are the columns of its product (`linear.py`), and the next layer's product takes them the same
way. The operations in between and after (bias, activation, softmax, means over draws) are traced on the transposed
view. Inductor would compile them to write results in the view's order: every layer would transpose twice, and loops
over draws would read one number at a time, with strides. Here the transposition comes last: those between two layers
cancel, and loops run along memory. Every number is computed by the same operations in the same order.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from vbdl.compiling.graph import name_of, operator_of

_aten = torch.ops.aten
_TRANSPOSE = _aten.transpose.int
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.expand.default)
_SOFTMAX = (_aten._log_softmax.default, _aten._softmax.default)
_OVER_OTHER_AXES = (_aten.sum.dim_IntList, _aten.mean.dim, _aten.amax.default, _aten.slice.Tensor)  # args[1]: the axes
_OF_LAYOUT = {"as_strided", "view_as_complex", "view_as_real", "set_"}  # operations that depend on memory layout


def transpose_last(traced: fx.GraphModule) -> None:
    """Rewrite a traced graph in place.

    Nodes need `meta["val"]`, as make_fx sets it. Outputs keep their memory layout; values inside the graph may not.
    """
    graph = traced.graph
    if any(name_of(n) in _OF_LAYOUT or n.target is _aten.view.dtype for n in graph.nodes):
        return
    for node in list(graph.nodes):
        if node.op == "output":
            with graph.inserting_before(node):
                node.args = tree_map_only(fx.Node, lambda n: _in_order(graph, n), node.args)
        elif node.op == "call_function" and all(isinstance(n.meta.get("val"), Tensor) for n in _around(node)):
            if node.target in _RESHAPES and node.args[0].meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(node.args[0])  # a reshape to the same shape
            elif node.target in _RESHAPES[:2]:
                node.target = _aten.reshape.default
            else:
                with graph.inserting_before(node):
                    _sink(graph, node)
    graph.eliminate_dead_code()
    traced.recompile()


def _sink(graph: fx.Graph, node: fx.Node) -> None:
    """Replace an operation on transposed views by the operation on their bases, then a transposition, if equivalent."""
    value, target = node.meta["val"], node.target
    args: Any = node.args
    kwargs: Any = node.kwargs
    operator = operator_of(node)
    if operator is not None and torch.Tag.pointwise in operator.tags and operator is not _aten.clone.default:
        whole = [n for n in node.all_input_nodes if n.meta["val"].shape == value.shape]
        if not whole or not all(map(_is_transposed, whole)):
            return
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: _transposed(graph, n))  # type: ignore[misc]
    elif target in (*_SOFTMAX, *_OVER_OTHER_AXES) and _is_transposed(args[0]):
        ndim = args[0].meta["val"].ndim
        dims = args[1] if len(args) > 1 and args[1] is not None else []
        axes = [a % ndim for a in (dims if isinstance(dims, list | tuple) else [dims])]
        if target in _SOFTMAX and axes == [ndim - 1]:
            args = (args[0].args[0], ndim - 2, *args[2:])
        elif target in _OVER_OTHER_AXES and axes and max(axes) < ndim - 2:
            args = (args[0].args[0], *args[1:])
        else:
            return
    else:
        return
    inner = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
    inner.meta["val"] = value.mT
    node.replace_all_uses_with(_transposed(graph, inner))


def _around(node: fx.Node) -> list[fx.Node]:
    return [node, *node.all_input_nodes]


def _is_transposed(node: fx.Node) -> bool:
    return node.target is _TRANSPOSE and set(node.args[1:]) == {-1, -2}


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Exchange the last two axes of a value; a value of one axis gets a second one of length 1, a scalar stays."""
    value = node.meta["val"]
    if _is_transposed(node):
        return node.args[0]  # type: ignore[return-value]
    if value.ndim == 0:
        return node
    if value.ndim == 1:
        transposed = graph.call_function(_aten.unsqueeze.default, (node, -1))
        transposed.meta["val"] = value.unsqueeze(-1)
    else:
        transposed = graph.call_function(_TRANSPOSE, (node, -2, -1))
        transposed.meta["val"] = value.mT
    return transposed


def _in_order(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A returned value, copied to be contiguous if the rewrite made a transposed view of it."""
    if not (_is_transposed(node) and node.meta["val"].is_contiguous()):
        return node
    return graph.call_function(_aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
