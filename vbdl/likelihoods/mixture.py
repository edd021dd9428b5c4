"""Distribution function, normal score and quantile of mixtures of normals, element by element, in float64.

Components have a leading samples axis; everything behind it is elements, whatever the axes mean. In plain torch without
a loop over data, so that a compiled call can hold it.
"""

import math

import torch
from torch import Tensor

from vbdl.metrics.intervals import normal_cdf

# of a bracket of w standard deviations 24 halvings leave 6e-8 w, and two steps of Newton square that twice
_HALVINGS, _NEWTON_STEPS = 24, 2
FARTHEST_SCORE = 38.0  # Φ(-38) is 3e-316, the last probability of float64


def averaged(values: Tensor, weights: Tensor | None) -> Tensor:
    """(samples, ...) -> (...) mean, or sum with these weights, (samples,)."""
    if weights is None:
        return values.mean(0)
    return (values * weights.reshape(-1, *[1] * (values.ndim - 1))).sum(0)


def mixture_score(mean: Tensor, std: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Φ⁻¹(F(y)), within ±38 and exact in both tails; mean, std: (samples, ...), y: (...), weights: (samples,)"""
    z = (y.to(torch.float64) - mean.to(torch.float64)) / std.to(torch.float64)
    below, above = averaged(normal_cdf(z), weights), averaged(normal_cdf(-z), weights)
    score = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))
    return score.clamp(-FARTHEST_SCORE, FARTHEST_SCORE)


def mixture_quantile(mean: Tensor, std: Tensor, score: Tensor, weights: Tensor | None = None) -> Tensor:
    """F⁻¹(Φ(score)); mean, std: (samples, ...), score: anything that broadcasts to (...), weights: (samples,)"""
    mean, std, score = mean.to(torch.float64), std.to(torch.float64), score.to(torch.float64)
    # a quantile of the mixture lies between the same quantile of its components
    each = mean + std * score
    if weights is None:
        low, high = each.amin(0), each.amax(0)
    else:
        counts = (weights > 0).reshape(-1, *[1] * (each.ndim - 1))
        low, high = each.where(counts, math.inf).amin(0), each.where(counts, -math.inf).amax(0)
    # in the smaller tail, where a probability has its digits
    side = torch.where(score > 0, -1.0, 1.0).to(torch.float64)
    tail = normal_cdf(side * score)

    def excess(at: Tensor) -> tuple[Tensor, Tensor]:
        z = (at - mean) / std
        return side * (averaged(normal_cdf(side * z), weights) - tail), z

    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = excess(middle)[0] < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    found = 0.5 * (low + high)
    for _ in range(_NEWTON_STEPS):
        far, z = excess(found)
        density = averaged(torch.exp(-0.5 * z.square()) / (math.sqrt(2 * math.pi) * std), weights)
        step = far / density
        found = torch.where(step.isfinite(), torch.minimum(torch.maximum(found - step, low), high), found)
    return found
