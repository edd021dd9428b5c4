"""Rules for normalization: batch norm in evaluation mode is exact, layer norm is not.

A batch norm in evaluation mode is a scale and a shift. A layer norm divides by a standard deviation that is random
itself; the rule takes the root of the expected variance in its place.
"""

import math

import torch
from torch import Tensor

from vbdl.engine.moments.arithmetic import add, div, mul, sub
from vbdl.engine.moments.value import Moments, each, mean_of, rule


def _affine(
    x: Moments | Tensor, weight: Moments | Tensor | None, bias: Moments | Tensor | None, shape: tuple[int, ...]
) -> Moments | Tensor:
    spread = lambda t: each(lambda v: v.view(shape), t)
    x = x if weight is None else mul(x, spread(weight))
    return x if bias is None else add(x, spread(bias))


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(
    x: Moments | Tensor,
    weight: Moments | Tensor | None,
    bias: Moments | Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    *settings: float,
) -> tuple:
    """The moments of a batch norm in evaluation mode. settings: (training,) momentum, eps."""
    *training, _, eps = settings
    if any(training):
        raise ValueError(
            "batch normalization with the statistics of the batch mixes its rows: set track_running_stats=True"
        )
    shape = (1, -1, *[1] * (x.ndim - 2))
    centered = sub(x, running_mean.view(shape)) if isinstance(x, Moments) else x - running_mean.view(shape)
    scale = (running_var + eps).rsqrt().view(shape)
    scaled = mul(centered, scale) if isinstance(centered, Moments) else centered * scale
    return _affine(scaled, weight, bias, shape), None, None


@rule("native_layer_norm")
def layer_norm(
    x: Moments | Tensor,
    shape: list[int],
    weight: Moments | Tensor | None,
    bias: Moments | Tensor | None,
    eps: float,
) -> tuple:
    """The moments of a layer norm that divides by the root of the expected variance, an approximation."""
    axes = list(range(x.ndim - len(shape), x.ndim))
    n = math.prod(shape)
    if isinstance(x, Moments):
        center = x.mean.mean(axes, keepdim=True)
        noise = x.var.mean(axes, keepdim=True)
        # the variance of an element minus the mean of all n elements, which contains the element itself
        var = x.var * (1 - 2 / n) + noise / n
        expected = (x.mean - center).square().mean(axes, keepdim=True) + noise * (1 - 1 / n)
        normal: Moments | Tensor = div(Moments(x.mean - center, var), (expected + eps).sqrt())
    else:
        normal = torch.nn.functional.layer_norm(mean_of(x), shape, eps=eps)
    return _affine(normal, weight, bias, (1,) * (x.ndim - len(shape)) + tuple(shape)), None, None
