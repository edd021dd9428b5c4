"""Rules for matrix products and convolutions, exact for independent inputs and weights, one or both of them random."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vbdl.engine.moments.arithmetic import add, mul
from vbdl.engine.moments.value import Moments, Value, mean_of, rule


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
