"""Rules for matrix products and convolutions, exact for independent inputs and weights, one or both of them random."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vbdl.engine.moments.arithmetic import add, mul
from vbdl.engine.moments.value import Correlated, KroneckerWeights, Moments, Value, mean_of, rule

MOST_JOINT = 64  # the most outputs of a row whose covariance is computed


def _bilinear(apply: Callable[[Tensor, Tensor], Tensor], a: Value, b: Value) -> Moments:
    """The moments of a sum of products a b, such as a matrix product.

    apply: the operation. Var = apply(Var a, (E b)^2) + apply(E[a^2], Var b).
    """
    var: Any = 0.0  # until one of them is random, which the rule is called for
    if isinstance(a, Moments):
        var = apply(a.var, mean_of(b) ** 2)
    if isinstance(b, Moments):
        second = mean_of(a) ** 2 + (a.var if isinstance(a, Moments) else 0.0)
        var = var + apply(second, b.var)
    return Moments(apply(mean_of(a), mean_of(b)), var)


@rule("mm", "bmm", "matmul", "mv")
def product(a: Value, b: Value) -> Moments:
    return _bilinear(torch.matmul, a, b)


@rule("addmm", "baddbmm", "addmv")
def product_and_sum(bias: Value, a: Value, b: Value, beta: float = 1.0, alpha: float = 1.0) -> Moments:
    return add(mul(bias, beta), mul(product(a, b), alpha))


@rule("stacked_linear")
def whole_linear(x: Value, weight: Value, bias: Value | None, stacked: Sequence[bool] = ()) -> Moments:
    """The moments of a linear layer, exact for a certain input."""
    if isinstance(x, Tensor) and isinstance(weight, KroneckerWeights) and weight.ndim == 2:
        return _kronecker(x, weight, bias)
    if isinstance(x, Tensor) and isinstance(weight, Correlated):
        return _correlated(x, weight, bias)
    return linear(x, weight, bias)


def _kronecker(x: Tensor, weight: KroneckerWeights, bias: Value | None) -> Moments:
    """The moments of a layer with Kronecker-factored weights; with the covariance of a row for few outputs."""
    product = torch.nn.functional.linear
    projected, rest = x @ weight.right, bias
    mean = product(x, weight.mean)
    if isinstance(bias, KroneckerWeights) and bias.source == weight.source:
        projected, mean, rest = projected + bias.right, mean + bias.mean, None
    variances = product(projected.square(), weight.std.square())  # of the p normals, (..., p)
    y = Moments(mean, product(variances, weight.left.square()))
    if mean.shape[-1] <= MOST_JOINT:
        y = Correlated(y.mean, y.var, weight.left * variances.sqrt().unsqueeze(-2), object())
    return y if rest is None else add(y, rest)


def _correlated(x: Tensor, weight: Correlated, bias: Value | None) -> Moments:
    """The moments of a layer with weights mean + root e + independent noise; x: (..., inputs)."""
    product = torch.nn.functional.linear
    rest = bias
    mean, own = product(x, weight.mean), product(x.square(), weight.own)
    root = torch.einsum("...i,oik->...ok", x, weight.root)
    if isinstance(bias, Correlated) and bias.source == weight.source:
        mean, own, root, rest = mean + bias.mean, own + bias.own, root + bias.root, None
    y = Correlated(mean, own + root.square().sum(-1), root, weight.source)
    return y if rest is None else add(y, rest)


@rule("linear")
def linear(x: Value, weight: Value, bias: Value | None = None) -> Moments:
    y = _bilinear(torch.nn.functional.linear, x, weight)
    return y if bias is None else add(y, bias)


@rule("convolution")
def convolution(x: Value, weight: Value, bias: Moments | Tensor | None, *settings: object) -> Moments:
    """The moments of a convolution. settings: stride, padding, dilation, transposed, output_padding, groups."""
    y = _bilinear(lambda a, b: torch.ops.aten.convolution(a, b, None, *settings), x, weight)
    if bias is None:
        return y
    spread = (-1, *[1] * (y.ndim - 2))
    reshaped = (
        Moments(bias.mean.view(spread), bias.var.view(spread)) if isinstance(bias, Moments) else bias.view(spread)
    )
    return add(y, reshaped)
