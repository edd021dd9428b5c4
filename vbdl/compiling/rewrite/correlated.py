"""Layers with a Kronecker-factored covariance: draws their outputs in place of their weights.

With weights mean + U_G (std * E) U_A^T, E of independent normals, the outputs of a row x are normal with

    mean x   and covariance   U_G diag(v) U_G^T,   v_j = sum_i std_ji^2 (U_A^T x)_i^2

so y[s, b] = mean x[b] + U_G (sqrt(v[b]) * noise[s]) has exactly the distribution of the row's outputs, as in
`vbdl.compiling.rewrite.local`. A draw costs outputs^2 operations a row, whatever the number of inputs. The bias is the
column of an input 1.

A layer with a dense covariance keeps drawn weights: drawing its outputs takes (outputs x inputs)^2 operations a row for
their covariance, which for more than some 30 weights is more than the products of all draws.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from vbdl_kernels import normal
from vbdl_kernels.philox import ACTIVATION

from vbdl.compiling.rewrite.linear import lower
from vbdl.nn.gaussian.operators import KRONECKER

_aten = torch.ops.aten
# what decides between outputs and weights: a number of draws, as draws must not depend on how many there are, and how
# many times more the operations of small products cost than those of one large product with kept weights
_DRAWS, _SMALL = 32, 1.5


@dataclass
class Kronecker:
    """A layer's weight, and bias, drawn as mean + U_G (std * noise) U_A^T; the tensors are nodes of the graph.

    mean, bias_mean: None for a weight or bias without mean. with_bias: whether the last column is the bias.
    """

    mean: fx.Node | None
    bias_mean: fx.Node | None
    output_vectors: fx.Node
    input_vectors: fx.Node
    std: fx.Node
    key: fx.Node
    layer: int
    with_bias: bool

    @property
    def is_cheaper(self) -> bool:
        """Whether drawing outputs is estimated to be faster than a product with kept weights for each draw."""
        outputs, inputs = self.std.meta["val"].shape
        of_outputs = inputs**2 + 2 * inputs * outputs + _DRAWS * outputs**2
        return _SMALL * of_outputs < _DRAWS * inputs * outputs


def kronecker_linear(
    x: Tensor,
    mean: Tensor | None,
    bias_mean: Tensor | None,
    output_vectors: Tensor,
    input_vectors: Tensor,
    std: Tensor,
    key: Tensor,
    layer: int,
) -> Tensor:
    """A linear layer with Kronecker-factored normal weights, by drawing its outputs.

    x: (rows, inputs), the same for all samples. mean: (outputs, inputs). bias_mean: (outputs,). input_vectors, std: of
    one input more if a bias is drawn too. key: (samples, 2). Returns (samples, rows, outputs).
    """
    wide, inputs = input_vectors.mT, x.shape[-1]
    bias = wide[:, inputs] if wide.shape[1] > inputs else None
    cast = lambda t: None if t is None else t.to(x.dtype)
    projected = lower(x, cast(wide[:, :inputs]), cast(bias), [False] * 3)  # type: ignore[arg-type]
    spread = lower(projected.square(), cast(std.square()), None, [False] * 3).sqrt()  # type: ignore[arg-type]
    noise = normal(key, layer, ACTIVATION, 1, std.shape[0]).to(x.dtype)
    y = lower(spread * noise, cast(output_vectors), None, [True, False, False])  # type: ignore[arg-type]
    if mean is not None:
        y = y + lower(x, mean.to(x.dtype), cast(bias_mean), [False] * 3)
    elif bias_mean is not None:
        y = y + bias_mean.to(x.dtype)
    return y


def kronecker_by(linear: fx.Node, weight: fx.Node, bias: Any) -> Kronecker | None:
    """The parts of a layer's weight and bias that one `kronecker_noise` draws, if nothing else uses it; or None.

    linear: the layer. bias: its bias, a node or None.
    """
    mean, deviation = _summed(weight)
    noise = _source(deviation)
    if noise is None or any(arguments.meta["val"].ndim != 2 for arguments in noise.args[:4]):  # type: ignore[union-attr]
        return None  # the factors differ between members: an ensemble of Gaussian posteriors
    output_vectors, input_vectors, std, key, layer = noise.args
    columns, inputs = noise.meta["val"].shape[2], weight.meta["val"].shape[2]
    if tuple(weight.meta["val"].shape[:2]) != tuple(noise.meta["val"].shape[:2]) or not _is_weight(deviation, inputs):
        return None
    bias_mean = None
    if columns == inputs + 1:
        if not isinstance(bias, fx.Node):
            return None
        bias_mean, bias_deviation = _summed(bias)
        if _source(bias_deviation) is not noise or not _is_bias(bias_deviation, inputs):
            return None
    elif columns != inputs:
        return None
    if mean is not None and mean.meta["val"].ndim != 2 or bias_mean is not None and bias_mean.meta["val"].ndim != 1:
        return None
    if not _ends_in(noise, linear):
        return None
    return Kronecker(
        mean, bias_mean, output_vectors, input_vectors, std, key, layer, columns == inputs + 1  # type: ignore[arg-type]
    )  # fmt: skip


def has_kronecker(traced: fx.GraphModule) -> bool:
    """Return whether a graph draws weights with a Kronecker-factored covariance."""
    return any(node.target is KRONECKER for node in traced.graph.nodes)


_COPIES = (_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten._to_copy.default)
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.expand.default)


def _bare(node: Any) -> Any:
    """The value behind copies, casts and reshapes that keep the shape."""
    while _calls(node, *_COPIES) or (_calls(node, *_RESHAPES) and _shape(node) == _shape(node.args[0])):
        node = node.args[0]
    return node


def _summed(node: Any) -> tuple[fx.Node | None, Any]:
    """The mean and the deviation of a drawn parameter; the mean is None for a deviation alone."""
    node = _bare(node)
    if _calls(node, _aten.add.Tensor) and len(node.args) == 2 and not node.kwargs:
        for mean, deviation in (node.args, node.args[::-1]):
            if isinstance(mean, fx.Node) and _source(_bare(deviation)) is not None:
                return mean, _bare(deviation)
    return None, node


def _source(deviation: Any) -> fx.Node | None:
    """The `kronecker_noise` that a deviation is, or is a part of; or None."""
    node = _bare(deviation)
    if _calls(node, _aten.slice.Tensor, _aten.select.int):
        node = _bare(node.args[0])
    return node if _calls(node, KRONECKER) else None


def _is_weight(deviation: fx.Node, inputs: int) -> bool:
    """Whether a deviation is the first `inputs` columns of its matrix."""
    node = _bare(deviation)
    if _calls(node, KRONECKER):
        return True
    columns = node.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
    dim, start, end, *step = node.args[1:]
    last = end + columns if isinstance(end, int) and end < 0 else end
    return _calls(node, _aten.slice.Tensor) and dim in (2, -1) and (start, last) == (0, inputs) and step in ([], [1])


def _is_bias(deviation: fx.Node, inputs: int) -> bool:
    """Whether a deviation is the column after the first `inputs` of its matrix."""
    node = _bare(deviation)
    return _calls(node, _aten.select.int) and node.args[1] in (2, -1) and node.args[2] in (inputs, -1)


def _ends_in(noise: fx.Node, linear: fx.Node) -> bool:
    """Whether all that is computed from a value is an argument of this layer, and of it alone."""
    waiting, seen = [noise], {noise}
    while waiting:
        for user in waiting.pop().users:
            if user is linear:
                continue
            if user.op == "output" or len(seen) > 20 or not _calls(user, *_OF_PARAMETERS):
                return False
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return True


_OF_PARAMETERS = (*_COPIES, *_RESHAPES, _aten.slice.Tensor, _aten.select.int, _aten.add.Tensor)


def _calls(node: Any, *targets: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape
