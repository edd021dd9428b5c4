"""Metrics of predictive intervals and of whole predictive distributions, for regression.

Gneiting, Raftery, Strictly proper scoring rules, prediction, and estimation, 2007,
https://doi.org/10.1198/016214506000001437 (interval score)
Gneiting, Balabdaoui, Raftery, Probabilistic forecasts, calibration and sharpness, 2007,
https://doi.org/10.1111/j.1467-9868.2007.00587.x (probability integral transform, sharpness)
Kuleshov, Fenner, Ermon, Accurate Uncertainties for Deep Learning Using Calibrated Regression, 2018,
https://arxiv.org/abs/1807.00263 (quantile calibration error)
"""

import math

import torch
from torch import Tensor

from vbdl.metrics._checks import check_finite, check_rate, check_std, check_targets
from vbdl.metrics.nll import check_mixture


def _check(lower: Tensor, upper: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # infinite bounds are allowed: a conformal interval calibrated on too few rows has them
    y = check_finite(y, "y")
    bounds = []
    for name, bound in (("lower", lower), ("upper", upper)):
        bound = bound.detach().to(torch.float64)
        if bound.shape != y.shape:
            raise ValueError(f"{name} is {tuple(bound.shape)} but y is {tuple(y.shape)}")
        if bool(bound.isnan().any()):
            raise ValueError(f"{name} has a NaN value; drop or repair such rows first")
        bounds.append(bound)
    if bool((bounds[0] > bounds[1]).any()):
        row = int((bounds[0] > bounds[1]).reshape(y.shape[0], -1).any(dim=1).nonzero()[0])
        raise ValueError(f"lower is above upper in row {row}")
    return bounds[0], bounds[1], y.to(bounds[0].device)


def covered(lower: Tensor, upper: Tensor, y: Tensor) -> Tensor:
    """1.0 for each target with lower <= y <= upper, else 0.0; all of one shape, float64.

    >>> vbdl.metrics.covered(torch.zeros(2), torch.ones(2), torch.tensor([0.5, 2.0]))
    tensor([1., 0.], dtype=torch.float64)
    """
    lower, upper, y = _check(lower, upper, y)
    return ((lower <= y) & (y <= upper)).to(torch.float64)


def interval_coverage(lower: Tensor, upper: Tensor, y: Tensor) -> float:
    """The share of targets inside their interval, over rows and outputs; ValueError if there are no rows.

    >>> vbdl.metrics.interval_coverage(torch.zeros(2), torch.ones(2), torch.tensor([0.5, 2.0]))
    0.5
    """
    inside = covered(lower, upper, y)
    if inside.numel() == 0:
        raise ValueError("y has no rows")
    return float(inside.mean())


def interval_width(lower: Tensor, upper: Tensor) -> float:
    """The mean width over rows and outputs, in units of the target; infinite if one interval is.

    >>> vbdl.metrics.interval_width(torch.zeros(2), torch.tensor([1.0, 2.0]))
    1.5
    """
    width = (upper.detach() - lower.detach()).to(torch.float64)
    if width.numel() == 0:
        raise ValueError("lower has no rows")
    if bool(width.isnan().any()) or bool((width < 0).any()):
        raise ValueError("upper - lower is negative or NaN in some row; check that lower <= upper and no bound is NaN")
    return float(width.mean())


def interval_score(lower: Tensor, upper: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Winkler's interval score of central (1 - alpha) intervals, in units of the target, lower is better; shape of y.

    It is the width plus 2/alpha times the distance of y from the interval.

    >>> vbdl.metrics.interval_score(torch.zeros(2), torch.ones(2), torch.tensor([0.5, 2.0]), alpha=0.1)
    tensor([ 1., 21.], dtype=torch.float64)
    """
    check_rate(alpha, "alpha")
    lower, upper, y = _check(lower, upper, y)
    # clamped before the product, so that an infinite bound gives an infinite score and not NaN
    below, above = (lower - y).clamp(min=0), (y - upper).clamp(min=0)
    return (upper - lower) + (2 / alpha) * (below + above)


def sharpness(std: Tensor) -> float:
    """The root of the mean predictive variance over rows and outputs, in units of the target.

    >>> round(vbdl.metrics.sharpness(torch.tensor([1.0, 4.0])), 3)  # of predictive variances
    2.915
    """
    std = check_std(std, std.shape, zero=True)
    if std.numel() == 0:
        raise ValueError("std has no rows")
    return math.sqrt(float((std**2).mean()))


def normal_cdf(z: Tensor) -> Tensor:
    """The standard normal distribution function Φ(z), with full relative precision in the lower tail, unlike ndtr."""
    return 0.5 * torch.erfc(-z * math.sqrt(0.5))


def gaussian_cdf(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """The probability integral transform P(Y <= y) under N(mean, std²); all of one shape.

    >>> vbdl.metrics.gaussian_cdf(torch.zeros(1), torch.ones(1), torch.tensor([1.96])).round(decimals=3)
    tensor([0.9750], dtype=torch.float64)
    """
    mean, y = check_targets(mean, y)
    std = check_std(std, mean.shape)
    return normal_cdf((y - mean) / std)


def mixture_cdf(means: Tensor, stds: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """P(Y <= y) under the Gaussian mixture over samples, for each output separately; shape of y.

    means, stds: (samples, batch) or (samples, batch, ...);  y: means.shape[1:];  weights: (samples,), equal by default

    >>> means = torch.tensor([[-1.0], [1.0]])  # (samples, rows)
    >>> vbdl.metrics.mixture_cdf(means, torch.ones(2, 1), torch.zeros(1))
    tensor([0.5000], dtype=torch.float64)
    """
    means, stds, target, log_weights = check_mixture(means, stds, y, weights)
    assert target is not None
    weight = log_weights.exp().reshape(-1, *[1] * (means.ndim - 1))
    # the weights sum to one only up to rounding, so the probability is clamped to 1
    return (weight * normal_cdf((target - means) / stds)).sum(dim=0).clamp(max=1.0)


class QuantileCalibration:
    """The streaming quantile calibration error, from probability integral transforms, in O(levels) memory.

    It compares each level p with the observed frequency of cdf(y) <= p.

    >>> _ = torch.manual_seed(0)
    >>> mean = torch.randn(500)
    >>> y = mean + 2 * torch.randn(500)  # the noise is twice as large as predicted
    >>> std = torch.ones(500)
    >>> error = vbdl.metrics.QuantileCalibration()
    >>> error.update(vbdl.metrics.gaussian_cdf(mean, std, y))
    >>> round(error.compute(), 2)
    0.1
    """

    def __init__(self, n_levels: int = 99):
        if n_levels < 1:
            raise ValueError(f"n_levels must be at least 1, not {n_levels}")
        self.levels = torch.arange(1, n_levels + 1, dtype=torch.float64) / (n_levels + 1)
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(self.levels.numel(), dtype=torch.int64)
        self.n = 0

    def update(self, cdf: Tensor) -> None:
        """Add a batch. cdf: P(Y <= y) of any shape, in [0, 1]."""
        cdf = check_finite(cdf, "cdf").reshape(-1)
        if bool(((cdf < 0) | (cdf > 1)).any()):
            raise ValueError("cdf must lie in [0, 1]; pass P(Y <= y), not y")
        first = torch.bucketize(cdf.cpu().contiguous(), self.levels)  # first level with cdf <= level
        self.counts += torch.bincount(first, minlength=self.levels.numel() + 1)[:-1].cumsum(0)
        self.n += cdf.numel()

    def merge(self, other: "QuantileCalibration") -> "QuantileCalibration":
        if other.levels.numel() != self.levels.numel():
            raise ValueError("merge needs the same levels")
        self.counts = self.counts + other.counts
        self.n += other.n
        return self

    def frequencies(self) -> Tensor:
        """The observed frequency of cdf(y) <= level for each level, (levels,), as in a calibration plot."""
        if self.n == 0:
            raise ValueError("no rows yet: call update first")
        return self.counts.to(torch.float64) / self.n  # int64 / int would be float32

    def compute(self) -> float:
        """The mean over levels of |frequency - level|, in [0, 0.5]."""
        return float((self.frequencies() - self.levels).abs().mean())


def quantile_calibration_error(cdf: Tensor, n_levels: int = 99) -> float:
    """The mean over levels of |frequency of cdf(y) <= level - level|. cdf: any shape, in [0, 1].

    >>> _ = torch.manual_seed(0)
    >>> mean = torch.randn(500)
    >>> y = mean + 2 * torch.randn(500)  # the noise is twice as large as predicted
    >>> std = torch.ones(500)
    >>> round(vbdl.metrics.quantile_calibration_error(vbdl.metrics.gaussian_cdf(mean, 2 * std, y)), 2)
    0.01
    """
    calibration = QuantileCalibration(n_levels)
    calibration.update(cdf)
    return calibration.compute()
