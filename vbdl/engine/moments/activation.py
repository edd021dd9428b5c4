"""Rules for activations of normal values: closed forms if there are any, otherwise Gauss-Hermite quadrature.

ReLU and the maximum of two: Clark, The Greatest of a Finite Set of Random Variables, Operations Research 9, 1961.
The logistic function is replaced by a mixture of normal distribution functions, whose error is at most 3e-8 and whose
expectation has a closed form: Monahan and Stefanski, Normal Scale Mixture Approximations to F*(z) and Computation of
the Logistic-Normal Integral, in Handbook of the Logistic Distribution, 1992.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.special import ndtr

from vbdl.engine.moments.arithmetic import add, mul
from vbdl.engine.moments.value import Moments, Value, mean_of, rule, var_of

_STEEPEST = 12.0  # standard deviations; farther from the kink a normal lies on one side, to float32 precision
_SMALL = 1e-3  # below this variance a first-order variance has a smaller error than a difference of two means
_NODES = 32  # of the Gauss-Hermite quadrature

_MIXTURE = [  # (weight, scale): logistic(x) = sum of weight * ndtr(scale * x)
    (0.003246343272134, 1.365340806296348),
    (0.051517477033972, 1.059523971016916),
    (0.195077912673858, 0.830791313765644),
    (0.315569823632818, 0.650732166639391),
    (0.274149576158423, 0.508135425366489),
    (0.131076880695470, 0.396313345166341),
    (0.027912418727972, 0.308904252267995),
    (0.001449567805354, 0.238212616409306),
]


def density(x: Tensor) -> Tensor:
    """The density of the standard normal distribution."""
    return (-0.5 * x**2).exp() / math.sqrt(2 * math.pi)


def maximum(a: Value, b: Value) -> Moments:
    """The moments of the larger of two independent normals, either of which may be a constant.

    The formula avoids differences of large numbers: with d = E a - E b, s^2 = Var a + Var b, and P and p the standard
    normal distribution function and density at d / s,
    E = E b + d P + s p,  Var = Var a P + Var b (1 - P) + d^2 P (1 - P) + d s p (1 - 2 P) - s^2 p^2.
    """
    difference = mean_of(a) - mean_of(b)
    together = var_of(a) + var_of(b)
    spread = together.clamp_min(torch.finfo(together.dtype).tiny).sqrt()
    steps = (difference / spread).clamp(-_STEEPEST, _STEEPEST)
    above, below, p = ndtr(steps), ndtr(-steps), density(steps)
    # beyond the clamp P (1 - P) is 0 in float32; the clamped d keeps d^2 from making it anything else
    d = steps * spread
    var = var_of(a) * above + var_of(b) * below + d**2 * above * below
    var = var + d * spread * p * (below - above) - (spread * p) ** 2
    return Moments(mean_of(b) + difference * above + spread * p, var.clamp_min(0))


@rule("relu")
def relu(x: Moments) -> Moments:
    return maximum(x, torch.zeros((), dtype=x.mean.dtype, device=x.mean.device))


@rule("leaky_relu")
def leaky_relu(x: Moments, slope: float = 0.01) -> Moments:
    """The moments of slope x + (1 - slope) relu(x), whose covariance follows from E[x relu(x)] = E[relu(x)^2]."""
    rectified = relu(x)
    covariance = rectified.var + rectified.mean * (rectified.mean - x.mean)
    rest = 1 - slope
    var = slope**2 * x.var + rest**2 * rectified.var + 2 * slope * rest * covariance
    return Moments(slope * x.mean + rest * rectified.mean, var.clamp_min(0))


@rule("clamp", "hardtanh")
def clamp(x: Moments, low: float | None = None, high: float | None = None) -> Moments:
    if low is not None:
        x = add(relu(add(x, -low)), low)
    if high is not None:
        flipped = relu(add(mul(x, -1.0), high))
        x = add(mul(flipped, -1.0), high)
    return x


@rule("abs")
def absolute(x: Moments) -> Moments:
    """The moments of |x| = 2 relu(x) - x."""
    return leaky_relu(x, -1.0)


def _logistic(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """E logistic(x) and E logistic'(x); the second is the derivative of the first with respect to the mean of x."""
    value, slope = torch.zeros_like(mean), torch.zeros_like(mean)
    for weight, scale in _MIXTURE:
        steep = scale / (1 + scale**2 * var).sqrt()
        value = value + weight * ndtr(steep * mean)
        slope = slope + weight * steep * density(steep * mean)
    return value, slope


@rule("sigmoid")
def sigmoid(x: Moments) -> Moments:
    """The moments of s = logistic(x): E s^2 = E s - E s', because s' = s (1 - s)."""
    mean, slope = _logistic(x.mean, x.var)
    var = torch.where(x.var < _SMALL, x.var * slope**2, mean * (1 - mean) - slope)
    return Moments(mean, var.clamp_min(0))


@rule("tanh")
def tanh(x: Moments) -> Moments:
    """The moments of tanh(x) = 2 logistic(2 x) - 1."""
    inner = sigmoid(Moments(2 * x.mean, 4 * x.var))
    return Moments(2 * inner.mean - 1, 4 * inner.var)


def _quadrature(function: Callable[[Tensor], Tensor], x: Moments) -> Moments:
    """The moments of function(x) by Gauss-Hermite quadrature; its error is below that of assuming that x is normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    leading = (_NODES, *[1] * x.ndim)
    at = torch.from_numpy(nodes).to(x.mean).view(leading)
    weight = torch.from_numpy(weights / weights.sum()).to(x.mean).view(leading)
    values = function(x.mean + at * x.var.clamp_min(0).sqrt())
    mean = (weight * values).sum(0)
    return Moments(mean, (weight * (values - mean).square()).sum(0))


@rule("gelu")
def gelu(x: Moments, approximate: str = "none") -> Moments:
    """The moments of gelu(x): the mean in closed form (Stein's lemma), the variance by quadrature.

    The tanh approximation of gelu has no closed form: both are by quadrature.
    """
    by_quadrature = _quadrature(lambda t: F.gelu(t, approximate=approximate), x)
    if approximate != "none":
        return by_quadrature
    scale = (1 + x.var).sqrt()
    at = x.mean / scale
    return Moments(x.mean * ndtr(at) + x.var / scale * density(at), by_quadrature.var)


@rule("silu")
def silu(x: Moments) -> Moments:
    """The moments of x logistic(x): the mean in closed form (Stein's lemma), the variance by quadrature."""
    value, slope = _logistic(x.mean, x.var)
    return Moments(x.mean * value + x.var * slope, _quadrature(F.silu, x).var)


def _by_quadrature(name: str) -> None:
    operation = getattr(torch.ops.aten, name)
    rule(name)(lambda x, *args, **kwargs: _quadrature(lambda t: operation(t, *args, **kwargs), x))


for _name in ("elu", "softplus", "mish", "hardswish", "hardsigmoid", "log_sigmoid_forward", "erf", "sin", "cos"):
    if _name != "log_sigmoid_forward":
        _by_quadrature(_name)
