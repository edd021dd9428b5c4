"""CDF recalibration: the predictive distribution function, bent so that its values become uniform.

Kuleshov, Fenner, Ermon, Accurate Uncertainties for Deep Learning Using Calibrated Regression, 2018,
https://arxiv.org/abs/1807.00263
Schwarz, Estimating the Dimension of a Model, 1978, https://doi.org/10.1214/aos/1176344136 (how many knots)
"""

import torch
from torch import Tensor

from vbdl.calibration.levels import score_of, with_ends
from vbdl.calibration.monotone import MonotoneCurve, fit_curve
from vbdl.calibration.steps import Steps
from vbdl.likelihoods.normal_mixture import RegressionPrediction
from vbdl.metrics._checks import check_finite
from vbdl.metrics.intervals import normal_cdf
from vbdl.types import Calibrator, Recalibration


class CDFRecalibration(Calibrator):
    """F'(y) = R(F(y)), R a smooth increasing map of [0, 1] under which F(y) of the calibration rows is uniform.

    For any predictive with a distribution function (Gaussian, mixture, somebody else's). R is a curve between normal
    scores, Φ⁻¹(F) -> Φ⁻¹(F'): a quadratic spline, straight beyond its last knots, fitted by maximum likelihood. A wrong
    scale or center is a straight line of it, so that tails without calibration rows are scaled as the others are. The
    number of knots grows with the rows (BIC); of a calibrated predictive it is none, and R changes nothing.
    The empirical distribution of F(y), which the paper takes, has no density: its spacings lose 0.42 nats a row,
    however many rows there are.

    Saved by version 0.1: knots and values are that empirical distribution, linear between knots, and stay it.
    """

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
        return self.fit_scores(score_of(cdf.detach()).reshape(-1))

    def fit_scores(self, scores: Tensor) -> "CDFRecalibration":
        """scores: Φ⁻¹(F(y)) of the calibration rows, any shape, which have digits where F rounds to 0 or 1."""
        if scores.numel() == 0:
            raise ValueError("scores has no rows")
        curve = fit_curve(check_finite(scores, "scores").reshape(-1))
        self.knots, self.slopes, self.offset, self.values = *curve, None
        return self

    def fit_prediction(self, prediction: RegressionPrediction, y: Tensor) -> "CDFRecalibration":
        """Fit one map for all elements, to a prediction that kept its samples."""
        return self.fit_scores(prediction.score(y))

    @property
    def steps(self) -> Steps | None:
        """The empirical distribution that version 0.1 has saved, or None where R is a curve."""
        return None if self.knots is None or self.values is None else Steps(self.knots, self.values)

    @property
    def recalibration(self) -> Recalibration:
        return self if self.steps is None else self.steps

    def forward(self, cdf: Tensor) -> Tensor:
        """Level of the predictive, any shape, in [0, 1] -> calibrated level"""
        if (steps := self.steps) is not None:
            return steps(cdf)
        return with_ends(cdf, normal_cdf(self.score(score_of(cdf))))

    def level(self, calibrated: Tensor) -> Tensor:
        """The level to ask the predictive for: the calibrated q-quantile is F⁻¹(level(q))."""
        if (steps := self.steps) is not None:
            return steps.level(calibrated)
        return with_ends(calibrated, normal_cdf(self.inverse(score_of(calibrated))))

    def slope(self, cdf: Tensor) -> Tensor:
        """dR/dF at a level of the predictive: what densities are multiplied with."""
        if (steps := self.steps) is not None:
            return steps.slope(cdf)
        return self.log_slope(score_of(cdf)).exp().to(cdf.dtype)

    def score(self, score: Tensor) -> Tensor:
        """Normal score of the predictive, any shape -> calibrated normal score, float64"""
        if (steps := self.steps) is not None:
            return steps.score(score)
        return self._curve()(score)

    def inverse(self, score: Tensor) -> Tensor:
        """Calibrated normal score, any shape -> normal score of the predictive, float64"""
        if (steps := self.steps) is not None:
            return steps.inverse(score)
        return self._curve().inverse(score)

    def log_slope(self, score: Tensor) -> Tensor:
        """log dR/dF where the predictive has this normal score, float64"""
        if (steps := self.steps) is not None:
            return steps.log_slope(score)
        curve, z = self._curve(), score.to(torch.float64)
        return curve.slope(z).log() + 0.5 * (z.square() - curve(z).square())

    def _curve(self) -> MonotoneCurve:
        if self.knots is None or self.slopes is None or self.offset is None:
            raise RuntimeError("CDFRecalibration has not been fitted: call fit first")
        return MonotoneCurve(self.knots, self.slopes, self.offset)
