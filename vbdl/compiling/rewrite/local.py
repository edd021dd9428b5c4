"""Local reparameterization: draws the outputs of a mean-field layer in place of its weights.

    y[s, b, o] = m[b, o] + sqrt(v[b, o]) noise[s, o],   m = x mean^T + bias_mean,   v = x^2 (std^2)^T + bias_std^2

Kingma, Salimans and Welling, NeurIPS 2015, https://arxiv.org/abs/1506.02557. If the weights act once on each row, this
is exactly the distribution of the row's output. All rows share the noise of a draw, so a draw is still a function of x,
but the joint distribution of several rows differs from that with drawn weights. It is used for quantities of single
rows; `joint=True` draws weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from vbdl_kernels import normal
from vbdl_kernels.philox import ACTIVATION
from vbdl_kernels.sample_weights import rows_columns

from vbdl.compiling.graph import BODY, PREFIX, dependence
from vbdl.compiling.rewrite.linear import add_bias, arguments, is_linear, lower

_aten = torch.ops.aten


@dataclass
class Normal:
    """A parameter drawn as mean + std * normal(key, layer, stream, ...); the tensors are nodes of the graph."""

    mean: fx.Node
    std: fx.Node
    key: fx.Node
    layer: int
    stream: int


def local_linear(
    x: Tensor, mean: Tensor, std: Tensor, bias_mean: Tensor | None, bias_std: Tensor | None, key: Tensor, layer: int
) -> Tensor:
    """A linear layer with normal weights, by drawing its outputs.

    x: (rows, inputs) if all samples share it, else (samples, rows, inputs). mean, std: (outputs, inputs).
    bias_mean, bias_std: (outputs,). Returns (samples, rows, outputs).
    """
    flags = [x.ndim == 3, False, False]
    m = lower(x, mean.to(x.dtype), None if bias_mean is None else bias_mean.to(x.dtype), flags)
    variance = None if bias_std is None else bias_std.square().to(x.dtype)
    v = lower(x.square(), std.square().to(x.dtype), variance, flags)
    return m + v.sqrt() * normal(key, layer, ACTIVATION, 1, mean.shape[0]).to(x.dtype)


def reparameterize(traced: fx.GraphModule, kinds: list[int], rows: int, hidden: bool) -> list[str]:
    """Rewrite mean-field layers in place, all for which local reparameterization is exact; return their nodes' names.

    hidden: False rewrites only layers whose input does not depend on the draw: two products serve all draws there.
    """
    region, rewritten = dependence(traced, kinds), []
    for node in list(traced.graph.nodes):
        if not is_linear(node):
            continue
        x, weight, bias, stacked = arguments(node)
        if region[x] not in (PREFIX, BODY) or not (region[x] == PREFIX or hidden):
            continue
        shape = x.meta["val"].shape[1:] if stacked[0] else x.meta["val"].shape
        drawn = drawn_by(weight)
        # weights that act on several vectors of a row make their outputs dependent, which noise on outputs does not
        if drawn is None or len(shape) != 2 or shape[0] != rows:
            continue
        bias_drawn = None if bias is None else drawn_by(bias)
        graph = traced.graph
        with graph.inserting_before(node):
            bias_moments = (bias_drawn.mean, bias_drawn.std) if bias_drawn else (None, None)
            y = graph.call_function(local_linear, (x, drawn.mean, drawn.std, *bias_moments, drawn.key, drawn.layer))
            if bias is not None and bias_drawn is None:
                y = add_bias(graph, y, bias, stacked[2], axes=1)
        y.meta, region[y] = dict(node.meta), region[node]  # the next layer may need them
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        rewritten.append(node.name)
    if rewritten:
        traced.graph.eliminate_dead_code()
        traced.recompile()
    return rewritten


def drawn_by(node: Any) -> Normal | None:
    """The parts of mean + std * normal, if a node is such a sum and its parts have no other users; otherwise None."""
    node = _through(node, _aten._to_copy.default)
    if not _calls(node, _aten.add.Tensor) or len(node.args) != 2 or len(node.users) != 1:
        return None
    mean, scaled = node.args
    if not _calls(scaled, _aten.mul.Tensor) or len(scaled.users) != 1:
        return None
    std, noise = scaled.args
    noise = _through(_through(noise, _aten._to_copy.default), _aten.view.default)
    if not _calls(noise, torch.ops.vbdl.normal.default) or len(noise.users) != 1:
        return None
    key, layer, stream, rows, columns = noise.args
    if not all(isinstance(n, fx.Node) for n in (mean, std)):
        return None
    shared = node.meta["val"].shape[1:]
    if mean.meta["val"].shape != shared or std.meta["val"].shape != shared:
        return None  # every member has its own mean: an ensemble of mean-field networks
    if (rows, columns) != rows_columns(shared):
        return None  # noise of another shape, which a network's own code reshaped
    return Normal(mean, std, key, layer, stream)


def _calls(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _through(node: Any, target: object) -> Any:
    return node.args[0] if _calls(node, target) and len(node.users) == 1 else node
