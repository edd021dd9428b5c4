"""CDF recalibration: the predictive distribution function, bent so that its values become uniform.

Kuleshov, Fenner, Ermon, Accurate Uncertainties for Deep Learning Using Calibrated Regression, 2018,
https://arxiv.org/abs/1807.00263
"""

import torch
from torch import Tensor, nn

from vbdl.metrics._checks import check_finite


class CDFRecalibration(nn.Module):
    """F'(y) = R(F(y)), R the empirical distribution of F(y) on the calibration rows, linear between
    them.

    For any predictive with a distribution function (Gaussian, mixture, somebody else's). R is
    already
    non-decreasing, so the paper's isotonic regression of it changes nothing; ranks are divided by n
    + 1,
    so that neither end of R is reached before 0 and 1.
    """

    knots: Tensor | None
    values: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("knots", None)  # (knots,) levels of F
        self.register_buffer("values", None)  # (knots,) calibrated levels

    def fit(self, cdf: Tensor) -> "CDFRecalibration":
        """cdf: F(y) of the calibration rows, any shape, in [0, 1]; for a map of its own, one output
        at a time."""
        u = check_finite(cdf, "cdf").reshape(-1)
        if u.numel() == 0:
            raise ValueError("cdf has no rows")
        if bool(((u < 0) | (u > 1)).any()):
            raise ValueError("cdf must lie in [0, 1]; pass P(Y <= y), not y")
        unique, counts = u.unique(return_counts=True)
        rank = counts.cumsum(0).to(torch.float64)
        # equal values: R takes the middle of the step, as it would with any tie-breaking noise
        value = (rank - (counts - 1) / 2) / (u.numel() + 1)
        inside = (unique > 0) & (unique < 1)
        zero, one = u.new_zeros(1), u.new_ones(1)
        self.knots = torch.cat((zero, unique[inside], one))
        self.values = torch.cat((zero, value[inside], one))
        return self

    def forward(self, cdf: Tensor) -> Tensor:
        """Level of the predictive, any shape, in [0, 1] -> calibrated level"""
        if self.knots is None or self.values is None:
            raise RuntimeError("CDFRecalibration has not been fitted: call fit first")
        return _interpolate(cdf, self.knots, self.values)

    def level(self, calibrated: Tensor) -> Tensor:
        """The level to ask the predictive for: the calibrated q-quantile is F⁻¹(level(q))."""
        if self.knots is None or self.values is None:
            raise RuntimeError("CDFRecalibration has not been fitted: call fit first")
        return _interpolate(calibrated, self.values, self.knots)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    p = x.to(torch.float64)
    right = torch.searchsorted(knots, p.contiguous(), right=True).clamp(1, knots.numel() - 1)
    x0, y0 = knots[right - 1], values[right - 1]
    return (y0 + (p - x0) * (values[right] - y0) / (knots[right] - x0)).to(x.dtype)
