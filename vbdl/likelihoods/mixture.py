"""Normal scores and quantiles of mixtures of normals, for each element, in float64.

Components are on a leading samples axis; all other axes are elements. Plain torch without a loop over data, so that
compiled calls can contain it. Probabilities are computed as logs: a predictive distribution that is far too narrow has
targets, and after calibration quantiles, at which a probability is 0 in float64.
"""

import math

import torch
from torch import Tensor

# 24 halvings shrink a bracket of w standard deviations to 6e-8 w, and two Newton steps square that error twice
_HALVINGS, _NEWTON_STEPS = 24, 2
FARTHEST_SCORE = 37.0  # Φ underflows in float64 not far beyond this score


def averaged(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over the samples, or the sum with weights (samples,); values: (samples, ...) -> (...)."""
    if weights is None:
        return values.mean(0)
    return (values * weights.reshape(-1, *[1] * (values.ndim - 1))).sum(0)


def _log_averaged(logs: Tensor, weights: Tensor | None) -> Tensor:
    """The log of the mean over the samples of exp(logs), or of the sum with weights (samples,)."""
    if weights is None:
        return logs.logsumexp(0) - math.log(logs.shape[0])
    return (logs + weights.log().reshape(-1, *[1] * (logs.ndim - 1))).logsumexp(0)


def mixture_score(mean: Tensor, std: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """The normal score Φ⁻¹(F(y)) of y in the mixture, (...), accurate in both tails.

    mean, std: (samples, ...); y: (...); weights: (samples,).
    """
    z = (y.to(torch.float64) - mean.to(torch.float64)) / std.to(torch.float64)
    below = _log_averaged(torch.special.log_ndtr(z), weights)
    above = _log_averaged(torch.special.log_ndtr(-z), weights)
    side = torch.where(below < above, -1.0, 1.0)
    return -side * _score_of_log(torch.minimum(below, above))


def _score_of_log(log_p: Tensor) -> Tensor:
    """The normal score Φ⁻¹(p) from log p <= log 0.5, for any small p."""
    near = torch.special.ndtri(log_p.exp())
    # Φ(-s) = φ(s) / s · (1 - 1/s² + 3/s⁴ ...), solved for s by fixed-point iteration, which converges fast in the tail
    base = -2 * log_p.clamp(max=-600.0) - math.log(2 * math.pi)
    far = base.sqrt()
    for _ in range(4):
        series = torch.log1p(-1 / far.square() + 3 / far.pow(4))
        far = (base - 2 * far.log() + 2 * series).sqrt()
    return torch.where(log_p < -650.0, -far, near)


def mixture_quantile(mean: Tensor, std: Tensor, score: Tensor, weights: Tensor | None = None) -> Tensor:
    """The quantile F⁻¹(Φ(score)) of the mixture, (...).

    mean, std: (samples, ...); score: broadcasts to (...); weights: (samples,).
    """
    mean, std, score = mean.to(torch.float64), std.to(torch.float64), score.to(torch.float64)
    # a quantile of the mixture lies between the same quantile of its components
    each = mean + std * score
    if weights is None:
        low, high = each.amin(0), each.amax(0)
    else:
        counts = (weights > 0).reshape(-1, *[1] * (each.ndim - 1))
        low, high = each.where(counts, math.inf).amin(0), each.where(counts, -math.inf).amax(0)
    # compute in the smaller tail, whose probability keeps its precision
    side = torch.where(score > 0, -1.0, 1.0).to(torch.float64)
    tail = torch.special.log_ndtr(side * score)

    def log_tail(at: Tensor) -> tuple[Tensor, Tensor]:
        z = (at - mean) / std
        return _log_averaged(torch.special.log_ndtr(side * z), weights), z

    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = side * (log_tail(middle)[0] - tail) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    quantile = 0.5 * (low + high)
    for _ in range(_NEWTON_STEPS):
        log_p, z = log_tail(quantile)
        log_density = _log_averaged(-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi), weights)
        step = side * (log_p - tail) * torch.exp(log_p - log_density)
        moved = torch.minimum(torch.maximum(quantile - step, low), high)
        quantile = torch.where(step.isfinite(), moved, quantile)
    return quantile
