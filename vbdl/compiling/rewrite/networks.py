"""The rewrite of a small network into one kernel, which runs all layers on chip for every draw or member.

    x -> linear -> relu -> linear -> relu -> linear        widths up to 128, separate weights for every sample

Run layer by layer, each kernel would do less work than its launch costs.
"""

import math

import torch
from torch import fx
from vbdl_kernels import regime
from vbdl_kernels.dispatch import KERNEL_DTYPES
from vbdl_kernels.mlp import WIDEST
from vbdl_kernels.philox import BIAS, WEIGHT

from vbdl.compiling.graph import name_of
from vbdl.compiling.rewrite.linear import arguments, is_linear
from vbdl.compiling.rewrite.local import Normal, drawn_by

_aten, _ops = torch.ops.aten, torch.ops.vbdl
_ACTIVATIONS = {_aten.relu.default: "relu", _aten.tanh.default: "tanh", _aten.silu.default: "silu"}


def whole_network(graph: fx.Graph, first: fx.Node, n_samples: int, budget: int) -> str | None:
    """Replace the layers from `first` on by one kernel, in place, if that is estimated to be fastest.

    Returns the kernel's name, or None if the layers stay. budget: bytes for weights that are kept of all draws.
    """
    chain, activation = _chain(first)
    if len(chain) < 2:
        return None
    x, _, _, stacked = arguments(first)
    value = x.meta["val"]
    widths = [value.shape[-1], *(arguments(layer)[1].meta["val"].shape[-2] for layer in chain)]
    rows, size = value.shape[-2], value.dtype.itemsize
    drawn = _drawn(chain)
    times = regime.of_network(n_samples, rows, widths, size, drawn=drawn is not None, exact=regime.is_exact(size))
    weights = n_samples * size * sum(i * o for i, o in zip(widths, widths[1:], strict=False))
    if drawn is not None and weights > budget:
        times = {"whole drawn": times["whole drawn"]}  # the other ways need kept weights
    best = min(times, key=times.__getitem__)
    if best == "layers" or math.isinf(times[best]):  # leaves the choice for each layer to `fused.py`
        return None
    last = chain[-1]
    with graph.inserting_before(last):
        if best == "whole drawn":
            assert drawn is not None
            pairs = list(zip(*drawn, strict=True))
            cast = lambda t: t if t.meta["val"].dtype == value.dtype else _as(graph, t, value.dtype)
            tensors = [[cast(getattr(d, name)) for d in which] for which in pairs for name in ("mean", "std")]
            numbers = [[d.layer for d in which] for which in pairs]
            new = graph.call_function(_ops.bayesian_mlp.default, (x, *tensors, drawn[0][0].key, *numbers, activation))
        else:
            layers = [arguments(layer) for layer in chain]
            new = graph.call_function(
                _ops.ensemble_mlp.default, (x, [a[1] for a in layers], [a[2] for a in layers], activation)
            )
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for layer in reversed(chain):
        before = layer.args[0]
        graph.erase_node(layer)
        if layer is not first:
            graph.erase_node(before)  # type: ignore[arg-type]
    return "bayesian_mlp" if best == "whole drawn" else "ensemble_mlp"


def _chain(first: fx.Node) -> tuple[list[fx.Node], str]:
    """The linear layers from `first` on that have the same activation between them, and the activation's name."""
    chain: list[fx.Node] = []
    activation: str | None = None
    node = first
    while _fits(node, first):
        chain.append(node)
        if len(node.users) != 1:
            break
        (between,) = node.users
        name = _ACTIVATIONS.get(between.target)  # type: ignore[arg-type]
        if name is None or name != (activation or name) or len(between.users) != 1:
            break
        (node,) = between.users
        if not is_linear(node) or node.args[0] is not between or between in node.args[1:]:
            break
        if _fits(node, first):
            activation = name
    return chain, activation or "relu"


def _fits(layer: fx.Node, first: fx.Node) -> bool:
    """True if the kernel can run this layer.

    It needs weights and bias for every sample, at most `WIDEST` inputs and outputs, rows of one vector each, and the
    dtype of the first layer's input throughout.
    """
    x, weight, bias, stacked = arguments(layer)
    if bias is None or not (stacked[1] and stacked[2]) or not (stacked[0] or layer is first):
        return False
    value, shape, dtype = x.meta["val"], weight.meta["val"].shape, arguments(first)[0].meta["val"].dtype
    return (
        value.ndim == 2 + stacked[0]
        and max(shape[-2:]) <= WIDEST
        and dtype in KERNEL_DTYPES
        and {t.meta["val"].dtype for t in (x, weight, bias)} == {dtype}
    )


def _drawn(chain: list[fx.Node]) -> list[tuple[Normal, Normal]] | None:
    """The distributions of the layers' (weight, bias) pairs, or None if not all of them are drawn with one key."""
    pairs = []
    for layer in chain:
        _, weight, bias, _ = arguments(layer)
        pair = drawn_by(weight), drawn_by(bias)
        if pair[0] is None or pair[1] is None or (pair[0].stream, pair[1].stream) != (WEIGHT, BIAS):
            return None
        pairs.append(pair)
    return pairs if len({source_of(d.key) for pair in pairs for d in pair}) == 1 else None


def source_of(key: fx.Node) -> fx.Node:
    """The original key behind the views and copies of it that each layer's noise uses."""
    while key.op == "call_function" and len(key.all_input_nodes) == 1:
        inner, name = key.all_input_nodes[0], name_of(key)
        same = inner.meta["val"].shape == key.meta["val"].shape
        if name == "permute":
            same = list(key.args[1]) == sorted(key.args[1])  # type: ignore[arg-type]
        if not same or name not in ("alias", "detach", "view", "permute", "clone", "_to_copy"):
            break
        key = inner
    return key


def _as(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return graph.call_function(_aten._to_copy.default, (node,), {"dtype": dtype})
