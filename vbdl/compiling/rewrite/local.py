"""Local reparameterization: draws the outputs of a layer with normal weights in place of its weights.

For independent weights, of a mean-field layer:

    y[s, b, o] = m[b, o] + sqrt(v[b, o]) noise[s, o],   m = x mean^T + bias_mean,   v = x^2 (std^2)^T + bias_std^2

Kingma, Salimans and Welling, NeurIPS 2015, https://arxiv.org/abs/1506.02557. If the weights act once on each row, this
is exactly the distribution of the row's output. All rows share the noise of a draw, so a draw is still a function of x,
but the joint distribution of several rows differs from that with drawn weights. It is used for quantities of single
rows; `joint=True` draws weights. `vbdl.compiling.rewrite.correlated` has the formula for correlated weights.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from vbdl_kernels import normal
from vbdl_kernels.philox import ACTIVATION
from vbdl_kernels.sample_weights import rows_columns

from vbdl.compiling.graph import BODY, PREFIX, dependence
from vbdl.compiling.rewrite.correlated import Kronecker, has_kronecker, kronecker_by, kronecker_linear
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


@dataclass
class Deviation:
    """A parameter drawn as std * normal(key, layer, stream, ...), with mean 0, as in a linearized network."""

    std: fx.Node
    key: fx.Node
    layer: int
    stream: int
    mean: None = None


def local_linear(
    x: Tensor,
    mean: Tensor | None,
    std: Tensor,
    bias_mean: Tensor | None,
    bias_std: Tensor | None,
    key: Tensor,
    layer: int,
) -> Tensor:
    """A linear layer with normal weights, by drawing its outputs.

    x: (rows, inputs) if all samples share it, else (samples, rows, inputs). mean, std: (outputs, inputs).
    bias_mean, bias_std: (outputs,). Without mean and bias_mean they are 0. Returns (samples, rows, outputs).
    """
    flags = [x.ndim == 3, False, False]
    variance = None if bias_std is None else bias_std.square().to(x.dtype)
    v = lower(x.square(), std.square().to(x.dtype), variance, flags)
    y = v.sqrt() * normal(key, layer, ACTIVATION, 1, std.shape[0]).to(x.dtype)
    if mean is not None:
        return lower(x, mean.to(x.dtype), None if bias_mean is None else bias_mean.to(x.dtype), flags) + y
    return y if bias_mean is None else y + bias_mean.to(x.dtype)


_OUTPUTS = "draw their outputs, not their weights"
_SAME = f"layers {_OUTPUTS}: the same distribution of every row; joint=True draws weights"
MEAN_FIELD, KRONECKER = f"mean-field {_SAME}", f"Kronecker-factored {_SAME}"
KEPT_WEIGHTS = "Kronecker-factored layers draw weights, which take fewer operations than outputs of their shape"


def draws_outputs(sentence: str) -> bool:
    """Whether a sentence of `reparameterize` says that outputs are drawn."""
    return _OUTPUTS in sentence


def reparameterize(traced: fx.GraphModule, kinds: list[int], rows: int, hidden: bool) -> Counter[str]:
    """Rewrite layers with normal weights in place, all for which drawing outputs is exact and cheaper.

    hidden: False rewrites only layers whose input does not depend on the draw: two products serve all draws there.
    Returns the number of layers for which each sentence is true.
    """
    if has_kronecker(traced):
        traced.graph.eliminate_dead_code()  # of forward-mode products, which would count as other uses of the noise
    region, sentences = dependence(traced, kinds), Counter[str]()
    for node in list(traced.graph.nodes):
        if not is_linear(node):
            continue
        x, weight, bias, stacked = arguments(node)
        if region[x] not in (PREFIX, BODY) or not (region[x] == PREFIX or hidden):
            continue
        shape = x.meta["val"].shape[1:] if stacked[0] else x.meta["val"].shape
        # weights that act on several vectors of a row make their outputs dependent, which noise on outputs does not
        if len(shape) != 2 or shape[0] != rows or not stacked[1]:
            continue
        with traced.graph.inserting_before(node):
            if y := _independent(traced.graph, node):
                sentences[MEAN_FIELD] += 1
            elif region[x] == PREFIX and not stacked[0] and (drawn := kronecker_by(node, weight, bias)):
                sentences[KRONECKER if drawn.is_cheaper else KEPT_WEIGHTS] += 1
                y = _kronecker(traced.graph, node, drawn) if drawn.is_cheaper else None
            if y is None:
                continue
        y.meta, region[y] = dict(node.meta), region[node]  # the next layer may need them
        node.replace_all_uses_with(y)
        traced.graph.erase_node(node)
    if sentences:
        traced.graph.eliminate_dead_code()
        traced.recompile()
    return sentences


def _independent(graph: fx.Graph, linear: fx.Node) -> fx.Node | None:
    """The outputs of a layer with independent weights, drawn by `local_linear`; None for any other layer."""
    x, weight, bias, stacked = arguments(linear)
    drawn = drawn_by(weight) or deviation_by(weight)
    if drawn is None:
        return None
    bias_drawn = None if bias is None else drawn_by(bias) or deviation_by(bias) or _noise_alone(graph, bias)
    if bias is not None and bias_drawn is None and stacked[2]:
        return None  # drawn in a way that is not known here, but may be where the network runs as it is
    bias_moments = (bias_drawn.mean, bias_drawn.std) if bias_drawn else (None, None)
    y = graph.call_function(local_linear, (x, drawn.mean, drawn.std, *bias_moments, drawn.key, drawn.layer))
    return y if bias is None or bias_drawn is not None else add_bias(graph, y, bias, stacked[2], axes=1)


def _kronecker(graph: fx.Graph, linear: fx.Node, drawn: Kronecker) -> fx.Node:
    """The outputs of a layer with Kronecker-factored weights, drawn by `kronecker_linear`."""
    x, _, bias, stacked = arguments(linear)
    factors = (drawn.output_vectors, drawn.input_vectors, drawn.std, drawn.key, drawn.layer)
    y = graph.call_function(kronecker_linear, (x, drawn.mean, drawn.bias_mean, *factors))
    return y if bias is None or drawn.with_bias else add_bias(graph, y, bias, stacked[2], axes=1)


def drawn_by(node: Any) -> Normal | None:
    """The parts of mean + std * normal, if a node is such a sum and its parts have no other users; otherwise None."""
    node = _through(node, _aten._to_copy.default)
    if not _calls(node, _aten.add.Tensor) or len(node.args) != 2 or len(node.users) != 1:
        return None
    mean, scaled = node.args
    drawn = _scaled(scaled)
    if drawn is None or not isinstance(mean, fx.Node) or mean.meta["val"].shape != drawn.std.meta["val"].shape:
        return None  # every member has its own mean: an ensemble of mean-field networks
    return Normal(mean, drawn.std, drawn.key, drawn.layer, drawn.stream)


def deviation_by(node: Any) -> Deviation | None:
    """The parts of std * normal, if a node is such a product and its parts have no other users; otherwise None."""
    for same_shape in (_aten.clone.default, _aten.expand.default, _aten.alias.default, _aten._to_copy.default):
        if _calls(node, same_shape) and node.args[0].meta["val"].shape == node.meta["val"].shape:
            node = _through(node, same_shape)
    return _scaled(node)


def _noise_alone(graph: fx.Graph, node: fx.Node) -> Deviation | None:
    """The parts of a normal of std 1, if a node is one and has one user; otherwise None."""
    if (counters := _counters(node)) is None:
        return None
    value = node.meta["val"]
    options = {"dtype": value.dtype, "device": value.device}
    std = graph.call_function(_aten.full.default, (list(value.shape[1:]), 1.0), options)
    std.meta["val"] = value.new_empty(value.shape[1:])
    return Deviation(std, *counters)


def _scaled(node: Any) -> Deviation | None:
    """The parts of std * normal, with the std of one draw, if it and its parts have one user each; otherwise None."""
    if not _calls(node, _aten.mul.Tensor) or len(node.users) != 1:
        return None
    std, noise = node.args
    if not isinstance(std, fx.Node) or (counters := _counters(noise)) is None:
        return None
    if std.meta["val"].shape != node.meta["val"].shape[1:]:
        return None  # every member has its own std: an ensemble
    return Deviation(std, *counters)


def _counters(noise: Any) -> tuple[Any, Any, Any] | None:
    """The key, layer and stream of normal noise with one user, cast and reshaped or not; None for anything else."""
    source = _through(_through(noise, _aten._to_copy.default), _aten.view.default)
    if not _calls(source, torch.ops.vbdl.normal.default) or len(source.users) != 1:
        return None
    key, layer, stream, rows, columns = source.args
    if (rows, columns) != rows_columns(noise.meta["val"].shape[1:]):
        return None  # noise of another shape, which a network's own code reshaped
    return key, layer, stream


def _calls(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _through(node: Any, target: object) -> Any:
    return node.args[0] if _calls(node, target) and len(node.users) == 1 else node
