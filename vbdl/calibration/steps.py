"""The CDF recalibration of version 0.1: the empirical distribution of F(y), linear between knots."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.calibration.levels import score_of
from vbdl.metrics.intervals import normal_cdf


@dataclass(frozen=True)
class Steps:
    """A map of [0, 1] that is linear between knots, as stored in artifacts of version 0.1."""

    knots: Tensor  # (knots,) levels of F
    values: Tensor  # (knots,) calibrated levels

    def __call__(self, cdf: Tensor) -> Tensor:
        """Levels of the predictive distribution, any shape -> calibrated levels."""
        return _interpolate(cdf, self.knots, self.values)

    def level(self, calibrated: Tensor) -> Tensor:
        """Calibrated levels, any shape -> levels of the predictive distribution."""
        return _interpolate(calibrated, self.values, self.knots)

    def slope(self, cdf: Tensor) -> Tensor:
        """The factor of recalibrated densities at levels of the predictive distribution."""
        right = torch.searchsorted(self.knots, cdf.to(torch.float64).contiguous(), right=True)
        slopes = self.values.diff() / self.knots.diff()
        return slopes.take(right.clamp(1, slopes.numel()) - 1).to(cdf.dtype)

    def score(self, score: Tensor) -> Tensor:
        return score_of(self(normal_cdf(score.to(torch.float64))))

    def inverse(self, score: Tensor) -> Tensor:
        return score_of(self.level(normal_cdf(score.to(torch.float64))))

    def log_slope(self, score: Tensor) -> Tensor:
        return self.slope(normal_cdf(score.to(torch.float64))).log()


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    p = x.to(torch.float64)
    right = torch.searchsorted(knots, p.contiguous(), right=True).clamp(1, knots.numel() - 1)
    x0, y0, x1, y1 = (t.take(at) for at in (right - 1, right) for t in (knots, values))
    return (y0 + (p - x0) * (y1 - y0) / (x1 - x0)).to(x.dtype)
