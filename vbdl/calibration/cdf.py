"""CDF recalibration: the predictive distribution function, bent so that its values become uniform.

Kuleshov, Fenner, Ermon, Accurate Uncertainties for Deep Learning Using Calibrated Regression, 2018,
https://arxiv.org/abs/1807.00263
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.likelihoods.normal_mixture import RegressionPrediction, as_columns
from vbdl.metrics._checks import check_finite


class CDFRecalibration(nn.Module):
    """F'(y) = R(F(y)), R the empirical distribution of F(y) on the calibration rows, linear between them.

    For any predictive with a distribution function (Gaussian, mixture, somebody else's). R is already non-decreasing,
    so the paper's isotonic regression of it changes nothing; ranks are divided by n + 1, so that neither end of R is
    reached before 0 and 1.
    """

    acts_on = "prediction"
    needs_samples = True
    knots: Tensor | None
    values: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("knots", None)  # (knots,) levels of F
        self.register_buffer("values", None)  # (knots,) calibrated levels

    def fit(self, cdf: Tensor) -> "CDFRecalibration":
        """cdf: F(y) of the calibration rows, any shape, in [0, 1]; for a map of its own, one output at a time."""
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

    def slope(self, cdf: Tensor) -> Tensor:
        """dR/dF at a level of the predictive: what densities are multiplied with, constant between knots."""
        if self.knots is None or self.values is None:
            raise RuntimeError("CDFRecalibration has not been fitted: call fit first")
        right = torch.searchsorted(self.knots, cdf.to(torch.float64).contiguous(), right=True)
        slopes = self.values.diff() / self.knots.diff()
        return slopes[right.clamp(1, slopes.numel()) - 1].to(cdf.dtype)

    def fit_prediction(self, prediction: Any, y: Tensor) -> "CDFRecalibration":
        """From a prediction that kept its samples; one map for all outputs together."""
        return self.fit(prediction.cdf(y))

    def fields(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return fields

    def wrap(self, prediction: RegressionPrediction) -> "RecalibratedPrediction":
        values = {f.name: getattr(prediction, f.name) for f in fields(RegressionPrediction)}
        return RecalibratedPrediction(**values, recalibration=self)


@dataclass(frozen=True)
class RecalibratedPrediction(RegressionPrediction):
    """A mixture with a recalibrated distribution function: cdf, quantile, interval and log_prob are the new ones.

    mean, total, aleatoric and epistemic stay those of the mixture: the map moves probability between its quantiles, and
    says nothing about which part of the spread is epistemic.
    """

    recalibration: Any = None

    def cdf(self, y: Tensor) -> Tensor:
        return self.recalibration(self._mixture().cdf(y))

    def quantile(self, q: float | Tensor) -> Tensor:
        levels = torch.as_tensor(q, dtype=torch.float64, device=self.mean.device)
        if bool(((levels <= 0) | (levels >= 1)).any()):
            raise ValueError(f"quantile levels lie strictly between 0 and 1, got {q}")
        asked = self.recalibration.level(levels)
        # in the mixture's own precision a level next to 1 may round to it
        tiny = torch.finfo(self.mean.dtype).eps / 4
        return self._mixture().quantile(asked.clamp(tiny, 1 - 2 * tiny).to(self.mean.dtype))

    def log_prob(self, y: Tensor) -> Tensor:
        """(batch,) log density, nats: of the mixture, plus the log slope of the map at F(y) of each output."""
        mixture = self._mixture()
        slope = self.recalibration.slope(mixture.cdf(as_columns(y, self.mean.shape)))
        return mixture.log_prob(y) + slope.log().sum(dim=-1)

    def _mixture(self) -> RegressionPrediction:
        """The prediction before: its quantile asks its own cdf, which must not be this one's."""
        return RegressionPrediction(**{f.name: getattr(self, f.name) for f in fields(RegressionPrediction)})


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    p = x.to(torch.float64)
    right = torch.searchsorted(knots, p.contiguous(), right=True).clamp(1, knots.numel() - 1)
    x0, y0 = knots[right - 1], values[right - 1]
    return (y0 + (p - x0) * (values[right] - y0) / (knots[right] - x0)).to(x.dtype)
