"""The gradients that a traced training step returns in the layout of the parameters, and work that changes nothing."""

import enum
from collections.abc import Sequence
from operator import getitem

import torch
from torch import Tensor, fx

from vbdl.compiling.graph import name_of, operator_of, own_bytes

aten = torch.ops.aten
_CREATED = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}
_TRANSPOSED = {aten.t.default, aten.transpose.int, aten.permute.default}
_PARTS = {"unbind", "split", "split_with_sizes", "chunk"}  # operators that return several views of their input
_PRODUCTS = {aten.mm.default, aten.bmm.default}


class Use(enum.Enum):
    """How a gradient that a step returns may be used."""

    NONE = "the loss does not depend on the parameter"
    ONCE = "as it is"
    TWICE = "as a copy, because another gradient returned before lies in the same memory"


def gradients_like(graph: fx.GraphModule, parameters: Sequence[Tensor]) -> list[Use]:
    """Make a traced step, (losses, *gradients), return every gradient in the memory layout of its parameter.

    Returns how each gradient may be used.

    The gradient of a stacked linear layer is traced as the transpose of a product. Transposed factors in the other
    order give the same numbers in the parameter's layout; any other gradient is copied, inside the graph.
    """
    output = next(n for n in graph.graph.nodes if n.op == "output")
    losses, *gradients = output.args[0]
    returned, uses, owners = [losses], [], set()
    for gradient, p in zip(gradients, parameters, strict=True):
        if operator_of(gradient) in _CREATED:
            uses.append(Use.NONE)
            returned.append(gradient)
            continue
        if not _lies_like(gradient, p):
            gradient = _swapped(graph.graph, gradient) or gradient
        if not _lies_like(gradient, p) and p.is_contiguous():
            with graph.graph.inserting_after(gradient):
                copied = graph.graph.call_function(
                    aten.clone.default, (gradient,), {"memory_format": torch.contiguous_format}
                )
            copied.meta["val"] = gradient.meta["val"].contiguous()
            gradient = copied
        returned.append(gradient)
        owner = _owner(gradient)
        uses.append(Use.TWICE if owner in owners or owner.op == "placeholder" else Use.ONCE)
        owners.add(owner)
    output.args = (tuple(returned),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return uses


def _owner(node: fx.Node) -> fx.Node:
    """The node whose memory a node's value lies in: a view lies in that of its input."""
    while node.op == "call_function":
        source = node.args[0] if node.args else None
        if node.target is getitem and isinstance(source, fx.Node) and name_of(source) in _PARTS:
            node = source.all_input_nodes[0]
        elif name_of(node) == "_unsafe_view" or (isinstance(node.meta.get("val"), Tensor) and own_bytes(node) == 0):
            if not node.all_input_nodes:
                break
            node = node.all_input_nodes[0]
        else:
            break
    return node


def _lies_like(gradient: fx.Node, p: Tensor) -> bool:
    return gradient.meta["val"].stride() == p.stride()


def _swapped(graph: fx.Graph, gradient: fx.Node) -> fx.Node | None:
    """(a @ b)^T as b^T @ a^T, for a gradient that is the transpose of a product, perhaps with views between them."""
    product = gradient.all_input_nodes[0] if _swaps_last_two(gradient) else None
    while product is not None and name_of(product) in ("view", "_unsafe_view") and _same_shape(product):
        product = product.all_input_nodes[0]
    if product is None or (operator := operator_of(product)) not in _PRODUCTS or operator is None:
        return None
    a, b = product.args[0], product.args[1]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    with graph.inserting_after(gradient):
        factors = [graph.call_function(aten.transpose.int, (factor, -2, -1)) for factor in (b, a)]
    for node, factor in zip(factors, (b, a), strict=True):
        node.meta["val"] = factor.meta["val"].transpose(-2, -1)
    with graph.inserting_after(factors[0]):  # each was put right after the gradient, so the first one is the last
        swapped = graph.call_function(operator, tuple(factors))
    swapped.meta["val"] = product.meta["val"].new_empty(gradient.meta["val"].shape)
    return swapped


def _swaps_last_two(node: fx.Node) -> bool:
    if operator_of(node) not in _TRANSPOSED:
        return False
    source, result = node.all_input_nodes[0].meta["val"], node.meta["val"]
    swapped = source.transpose(-2, -1)
    return source.ndim >= 2 and swapped.shape == result.shape and swapped.stride() == result.stride()


def _same_shape(node: fx.Node) -> bool:
    return node.all_input_nodes[0].meta["val"].shape == node.meta["val"].shape


def without_empty_work(graph: fx.GraphModule) -> None:
    """Take out of a traced graph what changes nothing: products with 1, and views, expansions and permutations to the
    same shape and strides.
    """
    for node in list(graph.graph.nodes):
        if (operator := operator_of(node)) is None or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source, result = node.args[0].meta.get("val"), node.meta.get("val")
        if not (isinstance(source, Tensor) and isinstance(result, Tensor)):
            continue
        same = source.shape == result.shape and source.stride() == result.stride() and source.dtype == result.dtype
        by_one = operator in (aten.mul.Tensor, aten.mul.Scalar) and node.args[1] == 1
        if same and (by_one or name_of(node) in ("view", "_unsafe_view", "expand", "permute")):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
