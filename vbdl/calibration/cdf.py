"""CDF recalibration: the predictive distribution function, bent so that its values become uniform.

Kuleshov, Fenner, Ermon, Accurate Uncertainties for Deep Learning Using Calibrated Regression, 2018,
https://arxiv.org/abs/1807.00263
Schwarz, Estimating the Dimension of a Model, 1978, https://doi.org/10.1214/aos/1176344136 (how many knots)
"""

from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calibration.monotone import MonotoneCurve, fit_curve
from vbdl.calibration.recalibrated import RecalibratedPrediction as RecalibratedPrediction
from vbdl.calibration.recalibrated import Recalibrations, recalibrated
from vbdl.likelihoods.mixture import FARTHEST_SCORE
from vbdl.likelihoods.normal_mixture import RegressionPrediction
from vbdl.metrics._checks import check_finite
from vbdl.metrics.intervals import normal_cdf


class CDFRecalibration(nn.Module):
    """F'(y) = R(F(y)), R a smooth increasing map of [0, 1] under which F(y) of the calibration rows is uniform.

    For any predictive with a distribution function (Gaussian, mixture, somebody else's). R is a curve between normal
    scores, Φ⁻¹(F) -> Φ⁻¹(F'): a quadratic spline, straight beyond its last knots, fitted by maximum likelihood. A wrong
    scale or centre is a straight line of it, so that tails without calibration rows are scaled as the others are. The
    number of knots grows with the rows (BIC); of a calibrated predictive it is none, and R changes nothing.
    The empirical distribution of F(y), which the paper takes, has no density: its spacings lose 0.42 nats a row,
    however many rows there are.

    Saved by version 0.1: knots and values are that empirical distribution, linear between knots, and stay it.
    """

    acts_on = "prediction"
    needs_samples = True
    knots: Tensor | None
    values: Tensor | None
    slopes: Tensor | None
    offset: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("knots", None)  # (knots,) normal scores; of version 0.1 levels of F
        self.register_buffer("values", None)  # (knots,) calibrated levels, of version 0.1 alone
        self.register_buffer("slopes", None)  # (knots,) of the curve at its knots
        self.register_buffer("offset", None)  # () the curve at its first knot

    def fit(self, cdf: Tensor) -> "CDFRecalibration":
        """cdf: F(y) of the calibration rows, any shape, in [0, 1]; for a map of its own, one output at a time."""
        u = check_finite(cdf, "cdf").reshape(-1)
        if u.numel() == 0:
            raise ValueError("cdf has no rows")
        if bool(((u < 0) | (u > 1)).any()):
            raise ValueError("cdf must lie in [0, 1]; pass P(Y <= y), not y")
        return self.fit_scores(_score_of(cdf.detach()).reshape(-1))

    def fit_scores(self, scores: Tensor) -> "CDFRecalibration":
        """scores: Φ⁻¹(F(y)) of the calibration rows, any shape, which have digits where F rounds to 0 or 1."""
        if scores.numel() == 0:
            raise ValueError("scores has no rows")
        curve = fit_curve(check_finite(scores, "scores").reshape(-1))
        self.knots, self.slopes, self.offset, self.values = *curve, None
        return self

    @property
    def of_steps(self) -> bool:
        """Whether it is the empirical distribution of version 0.1."""
        return self.values is not None

    def forward(self, cdf: Tensor) -> Tensor:
        """Level of the predictive, any shape, in [0, 1] -> calibrated level"""
        if self.of_steps:
            return _interpolate(cdf, *self._steps())
        return _ends(cdf, normal_cdf(self.score(_score_of(cdf))))

    def level(self, calibrated: Tensor) -> Tensor:
        """The level to ask the predictive for: the calibrated q-quantile is F⁻¹(level(q))."""
        if self.of_steps:
            knots, values = self._steps()
            return _interpolate(calibrated, values, knots)
        return _ends(calibrated, normal_cdf(self.inverse(_score_of(calibrated))))

    def slope(self, cdf: Tensor) -> Tensor:
        """dR/dF at a level of the predictive: what densities are multiplied with."""
        if not self.of_steps:
            return self.log_slope(_score_of(cdf)).exp().to(cdf.dtype)
        knots, values = self._steps()
        right = torch.searchsorted(knots, cdf.to(torch.float64).contiguous(), right=True)
        slopes = values.diff() / knots.diff()
        return slopes.take(right.clamp(1, slopes.numel()) - 1).to(cdf.dtype)

    def score(self, score: Tensor) -> Tensor:
        """Normal score of the predictive, any shape -> calibrated normal score, float64"""
        if self.of_steps:
            return _score_of(self(normal_cdf(score.to(torch.float64))))
        return self._curve()(score)

    def inverse(self, score: Tensor) -> Tensor:
        """Calibrated normal score, any shape -> normal score of the predictive, float64"""
        if self.of_steps:
            return _score_of(self.level(normal_cdf(score.to(torch.float64))))
        return self._curve().inverse(score)

    def log_slope(self, score: Tensor) -> Tensor:
        """log dR/dF where the predictive has this normal score, float64"""
        if self.of_steps:
            return self.slope(normal_cdf(score.to(torch.float64))).log()
        curve, z = self._curve(), score.to(torch.float64)
        return curve.slope(z).log() + 0.5 * (z.square() - curve(z).square())

    def fit_prediction(self, prediction: RegressionPrediction, y: Tensor) -> "CDFRecalibration":
        """From a prediction that kept its samples; one map for all elements together."""
        return self.fit_scores(prediction.score(y))

    def fields(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return fields

    def wrap(self, prediction: RegressionPrediction) -> RecalibratedPrediction:
        return recalibrated(prediction, self)

    def then(self, after: Any) -> Recalibrations:
        """This map and another after it, as one."""
        return Recalibrations(self, after)

    def _curve(self) -> MonotoneCurve:
        if self.knots is None or self.slopes is None or self.offset is None:
            raise RuntimeError("CDFRecalibration has not been fitted: call fit first")
        return MonotoneCurve(self.knots, self.slopes, self.offset)

    def _steps(self) -> tuple[Tensor, Tensor]:
        assert self.knots is not None and self.values is not None
        return self.knots, self.values


def _score_of(levels: Tensor) -> Tensor:
    """Φ⁻¹ in float64; an exact 0 or 1 is as far out as the last number below 1 of its dtype, on either side."""
    info = torch.finfo(levels.dtype if levels.is_floating_point() else torch.float64)
    p = levels.to(torch.float64).clamp(max=1 - info.eps / 2)
    return torch.special.ndtri(torch.where(p <= 0, info.eps / 2, p)).clamp(-FARTHEST_SCORE, FARTHEST_SCORE)


def _ends(asked: Tensor, found: Tensor) -> Tensor:
    """found in the dtype of what was asked, 0 at 0 and 1 at 1."""
    found = torch.where(asked <= 0, 0.0, torch.where(asked >= 1, 1.0, found))
    return found.to(asked.dtype if asked.is_floating_point() else torch.float64)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    p = x.to(torch.float64)
    right = torch.searchsorted(knots, p.contiguous(), right=True).clamp(1, knots.numel() - 1)
    x0, y0, x1, y1 = (t.take(at) for at in (right - 1, right) for t in (knots, values))
    return (y0 + (p - x0) * (y1 - y0) / (x1 - x0)).to(x.dtype)
