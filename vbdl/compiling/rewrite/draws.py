"""Drawn parameters in one form, mean + std * normal, in which the other rewrites look for them.

A network's own code may write the sum in any order and shape: `torch.exp(rho) * eps + mu`, with a std for each row or
one number, as `addcmul`, with the noise copied into a buffer first. The numbers stay the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
import vbdl_kernels  # noqa: F401  # registers torch.ops.vbdl
from torch import Tensor, fx

_aten = torch.ops.aten
_NORMAL = torch.ops.vbdl.normal.default
_DEEPEST = 50  # functions around noise in a sum; parameters have few
_SAME = (_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten.lift_fresh.default)
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_VIEWS = (_aten.detach.default, _aten.alias.default, *_RESHAPES)


@dataclass(frozen=True)
class _Affine:
    """mean + std * noise, where mean and std are nodes, numbers, or (function, *arguments) of such."""

    mean: Any
    std: Any
    noise: fx.Node
    depth: int = 0  # of the functions in each other


_Parts = dict[fx.Node, "_Affine | None"]


def in_one_form(traced: fx.GraphModule) -> None:
    """Rewrite every value that is affine in normal noise to add(mean, mul(std, noise)), in place; without mean to mul.

    There mean and std are tensors with the shape of one draw, and noise is `vbdl::normal`, reshaped and then cast.
    Noise alone stays as it is.
    """
    graph = traced.graph
    if not any(node.target is _NORMAL for node in graph.nodes):
        return
    graph.eliminate_dead_code()  # values that only attributes of a network held, like the density of a drawn weight
    _drop_views(graph)
    of: _Parts = {}
    rewritten: set[fx.Node] = set()  # the noise of sums
    for node in graph.nodes:  # in their order, so that those of its arguments are known
        of[node] = _affine(node, of)
    for node in reversed(list(graph.nodes)):  # a sum before its parts
        if not node.users or (parts := of.get(node)) is None or parts.noise is node or parts.noise in rewritten:
            continue
        noise, dtype = parts.noise, parts.noise.meta["val"].dtype
        with graph.inserting_before(node):
            shape = noise.meta["val"].shape[1:]
            mean, std = (_of_shape(graph, _built(graph, t), shape, noise.meta["val"]) for t in (parts.mean, parts.std))
            if {t.meta["val"].dtype for t in (mean, std)} != {dtype}:
                continue
            drawn = _call(graph, _aten.mul.Tensor, std, _canonical(graph, noise))
            if parts.mean != 0:
                drawn = _call(graph, _aten.add.Tensor, mean, drawn)
        rewritten.add(noise)
        drawn.meta = dict(node.meta)
        node.replace_all_uses_with(drawn)
    graph.eliminate_dead_code()
    traced.recompile()


def _affine(node: fx.Node, known: _Parts) -> _Affine | None:
    """The parts of a node that is affine in normal noise, element by element, or None.

    The noise has all axes of the node, and neither mean nor std has the axis of draws. known: the parts of the nodes
    before it.
    """
    if node.op != "call_function":
        return None
    if _source(node) is not None:
        return _Affine(0.0, 1.0, node)
    args: Any = node.args
    alpha, value = (float(node.kwargs.get(name, 1)) for name in ("alpha", "value"))  # type: ignore[arg-type]
    if set(node.kwargs) - {"alpha", "value"}:
        return None
    match node.target:
        case _aten.add.Tensor:
            return _sum(known, node, args[0], _times(args[1], alpha))
        case _aten.sub.Tensor:
            return _sum(known, node, args[0], _times(args[1], -alpha))
        case _aten.neg.default:
            return _sum(known, node, 0.0, _times(args[0], -1.0))
        case _aten.mul.Tensor:
            return _product(known, node, *args)
        case _aten.div.Tensor:
            return _product(known, node, args[0], (_aten.reciprocal.default, args[1]))
        case _aten.addcmul.default:
            return _sum(known, node, args[0], _times((_aten.mul.Tensor, args[1], args[2]), value))
        case _aten.lerp.Scalar | _aten.lerp.Tensor:
            start, end, weight = args
            at_start = (_aten.sub.Tensor, 1.0, weight) if isinstance(weight, fx.Node) else 1.0 - weight
            return _sum(known, node, _times(start, at_start), _times(end, weight))
        case _ if node.target in _SAME:
            return _sum(known, node, 0.0, args[0])
    return None


def _times(a: Any, b: Any) -> Any:
    return a if isinstance(b, int | float) and b == 1 else (_aten.mul.Tensor, a, b)


def _of_part(known: _Parts, part: Any, like: fx.Node) -> _Affine | None:
    """The parts of an argument of a node that nothing else uses, if they are not too deep."""
    found = None
    if isinstance(part, fx.Node) and len(part.users) == 1:
        found = known.get(part)
    elif isinstance(part, tuple) and part[0] is _aten.mul.Tensor:
        found = _product(known, like, *part[1:])
    return found if found is None or found.depth < _DEEPEST else None


def _sum(known: _Parts, node: fx.Node, a: Any, b: Any) -> _Affine | None:
    """The parts of a + b, of which one is affine in noise, and the other is the same for all draws."""
    for constant, drawn in ((a, b), (b, a)):
        parts = _of_part(known, drawn, node)
        if parts is not None and _is_same(constant, parts.noise) and _has_shape(node, parts.noise):
            both = (_aten.add.Tensor, constant, parts.mean)
            mean = constant if parts.mean == 0 else parts.mean if constant == 0 else both
            return _Affine(mean, parts.std, parts.noise, parts.depth + 1)
    return None


def _product(known: _Parts, node: fx.Node, a: Any, b: Any) -> _Affine | None:
    """The parts of a * b, of which one is affine in noise, and the other is the same for all draws."""
    for constant, drawn in ((a, b), (b, a)):
        parts = _of_part(known, drawn, node)
        if parts is not None and _is_same(constant, parts.noise) and _has_shape(node, parts.noise):
            mean = 0.0 if parts.mean == 0 else _times(parts.mean, constant)
            return _Affine(
                mean, constant if parts.std == 1 else _times(parts.std, constant), parts.noise, parts.depth + 1
            )
    return None


def _is_same(part: Any, noise: fx.Node) -> bool:
    """Whether a part has no axis of draws, so that it is the same for all of them."""
    if isinstance(part, tuple):
        return all(_is_same(p, noise) for p in part[1:])
    return isinstance(part, fx.Node | float | int) and _fits(part, noise.meta["val"])


def _has_shape(node: fx.Node, noise: fx.Node) -> bool:
    return node.meta["val"].shape == noise.meta["val"].shape


def _built(graph: fx.Graph, part: Any) -> Any:
    """The node, or the number, that computes a part."""
    if not isinstance(part, tuple):
        return part
    target, *arguments = part[0], *(_built(graph, p) for p in part[1:])
    if any(isinstance(a, fx.Node) for a in arguments):
        return _call(graph, target, *arguments)
    return float(target(*(torch.tensor(a, dtype=torch.float64) for a in arguments)))


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
