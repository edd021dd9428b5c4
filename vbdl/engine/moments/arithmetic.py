"""Rules for sums, products and powers; exact for independent arguments, which they are assumed to be."""

import torch
from torch import Tensor

from vbdl.engine.moments.value import Correlated, KroneckerWeights, Moments, Value, mean_of, rule, var_of

Axes = int | list[int] | None


def _filled(mean: Tensor, var: Tensor | float) -> Moments:
    var = torch.as_tensor(var, dtype=mean.dtype, device=mean.device)
    return Moments(mean, var.expand_as(mean))


@rule("add")
def add(a: Value, b: Value, alpha: float = 1.0) -> Moments:
    """The moments of a + alpha b."""
    if a is b:
        return mul(a, 1.0 + alpha)
    if alpha == 1 and (together := _correlated_sum(a, b) or _correlated_sum(b, a)):
        return together
    return _filled(mean_of(a) + alpha * mean_of(b), var_of(a) + alpha**2 * var_of(b))


def _correlated_sum(a: Value, b: Value) -> Moments | None:
    """The sum of a correlated value and any other; None if neither is a correlated value whose structure can stay."""
    if isinstance(a, KroneckerWeights) and isinstance(b, Tensor) and b.shape == a.shape:
        return a.with_mean(a.mean + b)
    if not isinstance(a, Correlated):
        return None
    mean = a.mean + mean_of(b)
    wide = lambda root: root.expand(*mean.shape, root.shape[-1])
    if not isinstance(b, Correlated):
        return Correlated(mean, torch.as_tensor(a.var + var_of(b)).expand_as(mean), wide(a.root), a.source)
    if a.source == b.source:
        root, source = wide(a.root) + wide(b.root), a.source
    else:  # independent normals side by side
        root, source = torch.cat([wide(a.root), wide(b.root)], -1), object()
    return Correlated(mean, a.own + b.own + root.square().sum(-1), root, source)


@rule("sub")
def sub(a: Value, b: Value, alpha: float = 1.0) -> Moments:
    return add(a, b, -alpha)


@rule("rsub")
def rsub(a: Value, b: Value, alpha: float = 1.0) -> Moments:
    """The moments of b - alpha a."""
    return add(b, a, -alpha)


@rule("neg")
def neg(a: Moments) -> Moments:
    return Moments(-a.mean, a.var)


@rule("mul")
def mul(a: Value, b: Value) -> Moments:
    """The moments of a b: Var ab = Var a (E b)^2 + Var b (E a)^2 + Var a Var b."""
    if a is b and isinstance(a, Moments):
        return power(a, 2)
    for one, scale in ((a, b), (b, a)):
        if isinstance(one, Correlated) and not isinstance(scale, Moments):
            mean, factor = one.mean * scale, torch.as_tensor(scale, dtype=one.mean.dtype, device=one.mean.device)
            root = one.root * factor.unsqueeze(-1)
            return Correlated(mean, one.var * factor**2, root.expand(*mean.shape, root.shape[-1]), one.source)
    m, n, v, w = mean_of(a), mean_of(b), var_of(a), var_of(b)
    return _filled(m * n, v * n**2 + w * m**2 + v * w)


@rule("div")
def div(a: Moments, b: Value) -> Moments:
    if isinstance(b, Moments):
        raise ValueError("moment propagation has no rule for a division by a random value: use estimator='sampling'")
    return Moments(a.mean / b, a.var / b**2)


@rule("pow")
def power(a: Moments, exponent: float) -> Moments:
    """The moments of a^1 or of a^2 for a normal a; other exponents raise ValueError."""
    if exponent == 1:
        return a
    if exponent != 2:
        raise ValueError(f"moment propagation has no rule for the power {exponent}: use estimator='sampling'")
    return Moments(a.mean**2 + a.var, 2 * a.var**2 + 4 * a.mean**2 * a.var)


@rule("square")
def square(a: Moments) -> Moments:
    return power(a, 2)


@rule("exp")
def exp(a: Moments) -> Moments:
    """The moments of exp(a) for a normal a, which is log-normal."""
    mean = (a.mean + a.var / 2).exp()
    return Moments(mean, torch.expm1(a.var) * mean**2)


def _count(shape: torch.Size, dims: Axes) -> int:
    axes = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    count = 1
    for axis in axes:
        count *= shape[axis]
    return count


@rule("mean")
def mean(a: Moments, dim: Axes = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Moments:
    dims = list(range(a.ndim)) if dim is None else dim
    return Moments(a.mean.mean(dims, keepdim), a.var.mean(dims, keepdim) / _count(a.shape, dims))


@rule("sum")
def total(a: Moments, dim: Axes = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Moments:
    dims = list(range(a.ndim)) if dim is None else dim
    return Moments(a.mean.sum(dims, keepdim), a.var.sum(dims, keepdim))
