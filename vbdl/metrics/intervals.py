"""Quality of predictive intervals and of predictive distributions as a whole, for regression.

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
    # infinite bounds are allowed: they are what a conformal set of too few rows honestly says
    y = check_finite(y, "y")
    bounds = []
    for name, bound in (("lower", lower), ("upper", upper)):
        bound = bound.detach().to(torch.float64)
        if bound.shape != y.shape:
            raise ValueError(f"{name} is {tuple(bound.shape)} but y is {tuple(y.shape)}")
        if bool(bound.isnan().any()):
            raise ValueError(f"{name} has a NaN; drop or repair such rows first")
        bounds.append(bound)
    if bool((bounds[0] > bounds[1]).any()):
        row = int((bounds[0] > bounds[1]).reshape(y.shape[0], -1).any(dim=1).nonzero()[0])
        raise ValueError(f"lower is above upper in row {row}")
    return bounds[0], bounds[1], y.to(bounds[0].device)


def covered(lower: Tensor, upper: Tensor, y: Tensor) -> Tensor:
    """1.0 where lower <= y <= upper. All of one shape, which is returned, float64."""
    lower, upper, y = _check(lower, upper, y)
    return ((lower <= y) & (y <= upper)).to(torch.float64)


def interval_coverage(lower: Tensor, upper: Tensor, y: Tensor) -> float:
    """Share of targets inside their interval, over rows and outputs. ValueError without rows."""
    inside = covered(lower, upper, y)
    if inside.numel() == 0:
        raise ValueError("y has no rows")
    return float(inside.mean())


def interval_width(lower: Tensor, upper: Tensor) -> float:
    """Mean width over rows and outputs, target units; infinite as soon as one interval is."""
    width = (upper.detach() - lower.detach()).to(torch.float64)
    if width.numel() == 0:
        raise ValueError("lower has no rows")
    if bool(width.isnan().any()) or bool((width < 0).any()):
        raise ValueError("widths must be numbers of at least 0: is lower above upper, or a bound NaN?")
    return float(width.mean())


def interval_score(lower: Tensor, upper: Tensor, y: Tensor, alpha: float) -> Tensor:
    """Winkler's score of central (1 - alpha) intervals, target units, lower is better; shape of y.

    Width, plus 2/alpha times the distance by which y lies outside.
    """
    check_rate(alpha, "alpha")
    lower, upper, y = _check(lower, upper, y)
    # clamp before the product, so that an infinite bound gives an infinite width and not NaN
    below, above = (lower - y).clamp(min=0), (y - upper).clamp(min=0)
    return (upper - lower) + (2 / alpha) * (below + above)


def sharpness(std: Tensor) -> float:
    """Root of the mean predictive variance over rows and outputs, target units."""
    std = check_std(std, std.shape, zero=True)
    if std.numel() == 0:
        raise ValueError("std has no rows")
    return math.sqrt(float((std**2).mean()))


def normal_cdf(z: Tensor) -> Tensor:
    """Φ(z), relatively exact in the lower tail too, where torch.special.ndtr is not."""
    return 0.5 * torch.erfc(-z * math.sqrt(0.5))


def gaussian_cdf(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """P(Y <= y) under N(mean, std²): the probability integral transform. All of one shape."""
    mean, y = check_targets(mean, y)
    std = check_std(std, mean.shape)
    return normal_cdf((y - mean) / std)


def mixture_cdf(means: Tensor, stds: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """P(Y <= y) under the Gaussian mixture over samples, each output on its own; shape of y.

    means, stds: (samples, batch) or (samples, batch, ...);  y: means.shape[1:]
    """
    means, stds, target, log_weights = check_mixture(means, stds, y, weights)
    assert target is not None
    weight = log_weights.exp().reshape(-1, *[1] * (means.ndim - 1))
    # the weights sum to one up to rounding, the probability must not pass it
    return (weight * normal_cdf((target - means) / stds)).sum(dim=0).clamp(max=1.0)


class QuantileCalibration:
    """Streaming quantile calibration error from probability integral transforms, O(levels) memory.

    At each level p the observed frequency of cdf(y) <= p is compared with p.
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
        """cdf: P(Y <= y) of any shape, in [0, 1]."""
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
        """Observed frequency of cdf(y) <= level, (levels,): the calibration plot."""
        if self.n == 0:
            raise ValueError("no rows yet: call update first")
        return self.counts.to(torch.float64) / self.n  # int64 / int would be float32

    def compute(self) -> float:
        """Mean over levels of |frequency - level|, in [0, 0.5]."""
        return float((self.frequencies() - self.levels).abs().mean())


def quantile_calibration_error(cdf: Tensor, n_levels: int = 99) -> float:
    """Mean over levels of |share of cdf(y) <= level - level|; cdf of any shape in [0, 1]."""
    calibration = QuantileCalibration(n_levels)
    calibration.update(cdf)
    return calibration.compute()
