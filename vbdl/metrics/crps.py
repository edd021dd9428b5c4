"""The continuous ranked probability score (CRPS) and the energy score, computed exactly, in units of the target.

Gneiting, Raftery, Strictly proper scoring rules, prediction, and estimation, 2007,
https://doi.org/10.1198/016214506000001437
Grimit, Gneiting, Berrocal, Johnson, The continuous ranked probability score for circular variables and its application
to mesoscale forecast ensemble verification, 2006, https://doi.org/10.1256/qj.05.235 (the mixture)
Ferro, Fair scores for ensemble forecasts, 2014, https://doi.org/10.1002/qj.2270
"""

import math

import torch
from torch import Tensor

from vbdl.metrics._checks import check_finite, check_std, check_targets
from vbdl.metrics.nll import check_mixture

_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def _expected_distance(difference: Tensor, std: Tensor) -> Tensor:
    """E|difference + std·Z| for a standard normal Z; |difference| if std is 0."""
    z = difference / std.clamp(min=torch.finfo(torch.float64).tiny)
    # erf(z/√2) = 2Φ(z) - 1, but without the cancellation of the right side
    spread = 2 * std * _INV_SQRT_2PI * torch.exp(-0.5 * z * z)
    smooth = spread + difference * torch.erf(z / math.sqrt(2))
    return torch.where(std > 0, smooth, difference.abs())


def crps_gaussian(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """The CRPS of N(mean, std²) for each output separately, in units of the target; |y - mean| if std is 0.

    mean, std, y: (batch,) or (batch, ...)  ->  the same shape

    >>> mean, std, y = torch.zeros(2), torch.ones(2), torch.tensor([0.0, 3.0])
    >>> vbdl.metrics.crps_gaussian(mean, std, y).round(decimals=3)
    tensor([0.2340, 2.4370], dtype=torch.float64)
    """
    mean, y = check_targets(mean, y)
    std = check_std(std, mean.shape, zero=True)
    return _expected_distance(y - mean, std) - std / math.sqrt(math.pi)


def crps_mixture(means: Tensor, stds: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """The CRPS of the Gaussian mixture over samples, in closed form, for each output separately, in target units.

    means, stds: (samples, batch) or (samples, batch, ...);  y: means.shape[1:]  ->  y.shape
    weights: (samples,), equal by default.

    Time grows with the square of the number of samples, memory linearly.

    >>> means = torch.tensor([[-1.0], [1.0]])  # (samples, rows)
    >>> vbdl.metrics.crps_mixture(means, torch.ones(2, 1), torch.zeros(1)).round(decimals=3)
    tensor([0.3590], dtype=torch.float64)
    """
    means, stds, target, log_weights = check_mixture(means, stds, y, weights, zero=True)
    assert target is not None
    weight = log_weights.exp().reshape(-1, *[1] * (means.ndim - 1))
    score = (weight * _expected_distance(target - means, stds)).sum(dim=0)
    for s in range(means.shape[0]):
        pair = _expected_distance(means[s] - means, torch.hypot(stds[s].expand_as(stds), stds))
        score = score - 0.5 * weight[s] * (weight * pair).sum(dim=0)
    return score


def crps_samples(samples: Tensor, y: Tensor, fair: bool = False) -> Tensor:
    """The CRPS of the samples' empirical distribution for each output separately, in units of the target.

    samples: (samples, batch) or (samples, batch, ...);  y: samples.shape[1:]  ->  y.shape

    fair=True gives an unbiased estimate for the distribution the samples were drawn from (Ferro); needs two samples.

    >>> samples = torch.tensor([[-1.0], [1.0]])  # (samples, rows)
    >>> vbdl.metrics.crps_samples(samples, torch.zeros(1))
    tensor([0.5000], dtype=torch.float64)
    """
    samples, y = _check_samples(samples, y, fair)
    m = samples.shape[0]
    ordered = samples.sort(dim=0).values
    rank = torch.arange(1, m + 1, dtype=torch.float64, device=samples.device)
    rank = rank.reshape(-1, *[1] * (samples.ndim - 1))
    # Σ_ij |x_i - x_j| / 2 = Σ_i (2i - m - 1) x_(i)
    half_pairs = ((2 * rank - m - 1) * ordered).sum(dim=0)
    return (samples - y).abs().mean(dim=0) - half_pairs / (m * (m - 1) if fair else m * m)


def energy_score(samples: Tensor, y: Tensor, fair: bool = False) -> Tensor:
    """The energy score E‖X - y‖ - ½E‖X - X'‖ of each row, in units of the target: a CRPS of all outputs jointly.

    samples: (samples, batch, ...);  y: (batch, ...)  ->  (batch,)

    >>> samples = torch.tensor([[[-1.0, 0.0]], [[1.0, 0.0]]])  # (samples, rows, outputs)
    >>> vbdl.metrics.energy_score(samples, torch.zeros(1, 2))
    tensor([0.5000], dtype=torch.float64)
    """
    samples, y = _check_samples(samples, y, fair)
    if samples.ndim < 3:
        raise ValueError(
            f"samples must be (samples, batch, outputs) or (samples, batch, ...), not {tuple(samples.shape)}"
        )
    samples, y = samples.flatten(2), y.flatten(1)
    m = samples.shape[0]
    score = torch.linalg.vector_norm(samples - y, dim=2).mean(dim=0)
    pairs = torch.zeros_like(score)
    for s in range(1, m):
        pairs += torch.linalg.vector_norm(samples[s] - samples[:s], dim=2).sum(dim=0)
    return score - pairs / (m * (m - 1) if fair else m * m)


def _check_samples(samples: Tensor, y: Tensor, fair: bool) -> tuple[Tensor, Tensor]:
    samples, y = check_finite(samples, "samples"), check_finite(y, "y")
    if samples.ndim < 2 or samples.shape[0] == 0:
        raise ValueError(f"samples must be (samples, batch) or (samples, batch, ...), not {tuple(samples.shape)}")
    if y.shape != samples.shape[1:]:
        raise ValueError(f"y is {tuple(y.shape)} but samples is {tuple(samples.shape)}: y must be samples.shape[1:]")
    if fair and samples.shape[0] < 2:
        raise ValueError("the fair score needs at least two samples")
    return samples, y.to(samples.device)
