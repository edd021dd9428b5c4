"""Drawn parameters in one form, mean + std * normal, in which the other rewrites look for them.

A network's own code may write the sum in any order and shape: `torch.exp(rho) * eps + mu`, with a std for each row or
one number, as `addcmul`, with the noise copied into a buffer first. The numbers stay the same.
"""

from typing import Any

import torch
import vbdl_kernels  # noqa: F401  # registers torch.ops.vbdl
from torch import Tensor, fx

_aten = torch.ops.aten
_NORMAL = torch.ops.vbdl.normal.default
_SAME = (_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_VIEWS = (_aten.detach.default, _aten.alias.default, *_RESHAPES)


def in_one_form(traced: fx.GraphModule) -> None:
    """Rewrite every sum of a mean and scaled normal noise to add(mean, mul(std, noise)), in place.

    There mean and std are tensors with the shape of one draw, and noise is `vbdl::normal`, reshaped and then cast.
    """
    graph = traced.graph
    if not any(node.target is _NORMAL for node in graph.nodes):
        return
    graph.eliminate_dead_code()  # values that only attributes of a network held, like the density of a drawn weight
    _drop_views(graph)
    for node in list(graph.nodes):
        if (parts := _parts(node)) is None:
            continue
        mean, std, noise = parts
        with graph.inserting_before(node):
            shape = noise.meta["val"].shape[1:]
            mean, std = (_of_shape(graph, t, shape, noise.meta["val"]) for t in (mean, std))
            noise = _canonical(graph, noise)
            scaled = _call(graph, _aten.mul.Tensor, std, noise)
            drawn = _call(graph, _aten.add.Tensor, mean, scaled)
        drawn.meta = dict(node.meta)
        node.replace_all_uses_with(drawn)
    graph.eliminate_dead_code()
    traced.recompile()


def _parts(node: fx.Node) -> tuple[Any, Any, fx.Node] | None:
    """The mean, std and noise of a node that is their sum in any form, or None.

    The noise has all axes of the sum, and neither mean nor std has the axis of draws.
    """
    if node.op != "call_function" or node.kwargs:
        return None
    args: Any = node.args
    candidates: list[tuple[Any, Any, Any]]
    if node.target is _aten.addcmul.default:
        candidates = [(args[0], args[1], args[2]), (args[0], args[2], args[1])]
    elif node.target is _aten.add.Tensor:
        candidates = [
            (mean, *factors)
            for mean, scaled in (args, args[::-1])
            if _calls(scaled, _aten.mul.Tensor) and len(scaled.users) == 1
            for factors in (scaled.args, scaled.args[::-1])
        ]
    else:
        return None
    for mean, std, noise in candidates:
        if _source(noise) is None or not isinstance(mean, fx.Node) or not isinstance(std, fx.Node | float | int):
            continue
        value, shape = noise.meta["val"], node.meta["val"].shape
        if value.shape == shape and all(_fits(t, value) for t in (mean, std)):
            return mean, std, noise
    return None


def _fits(part: Any, noise: Tensor) -> bool:
    """Whether a mean or std is of the noise's dtype and has the shape of one draw, or can be expanded to it."""
    if not isinstance(part, fx.Node):
        return True
    value = part.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != noise.dtype or value.ndim >= noise.ndim:
        return False
    shape = noise.shape[noise.ndim - value.ndim :]
    return all(size in (1, wanted) for size, wanted in zip(value.shape, shape, strict=True))


def _source(node: Any) -> fx.Node | None:
    """The `vbdl::normal` behind copies, casts and reshapes of it that have one user each, or None."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        if node.target is _NORMAL:
            return node
        source: Any = node.args[0]
        is_view = node.target is _aten.expand.default and source.meta["val"].shape == node.meta["val"].shape
        if not is_view and node.target not in (*_SAME, *_RESHAPES, _aten._to_copy.default):
            return None
        node = source
    return None


def _drop_views(graph: fx.Graph) -> None:
    """Replace views and reshapes that give a value its own shape back, as a trace writes them for `noise.mul_(std)`."""
    for node in graph.nodes:
        value, source, shape = node, node, node.meta["val"].shape if node.target in _VIEWS else None
        while source.target in _VIEWS:
            source = source.args[0]
            if source.meta["val"].shape == shape:
                value = source
        if value is not node:
            node.replace_all_uses_with(value)
    graph.eliminate_dead_code()


def _canonical(graph: fx.Graph, noise: fx.Node) -> fx.Node:
    """The same noise, reshaped and then cast."""
    source, value = _source(noise), noise.meta["val"]
    assert source is not None
    if source.meta["val"].shape != value.shape:
        source = _call(graph, _aten.view.default, source, list(value.shape))
    if source.meta["val"].dtype != value.dtype:
        cast = graph.call_function(_aten._to_copy.default, (source,), {"dtype": value.dtype})
        cast.meta["val"] = value
        return cast
    return source


def _of_shape(graph: fx.Graph, part: Any, shape: torch.Size, like: Tensor) -> fx.Node:
    """A mean or std, a node or a number, as a tensor with the shape of one draw."""
    if not isinstance(part, fx.Node):
        options = {"dtype": like.dtype, "device": like.device}
        full = graph.call_function(_aten.full.default, (list(shape), part), options)
        full.meta["val"] = like.new_empty(shape)
        return full
    return part if part.meta["val"].shape == shape else _call(graph, _aten.expand.default, part, list(shape))


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    """A new node, with the value that it has for the values of its arguments."""
    node = graph.call_function(target, arguments)
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in arguments]
    node.meta["val"] = target(*values)
    return node


def _calls(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target
