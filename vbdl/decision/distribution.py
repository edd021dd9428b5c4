"""The predictive distribution of a regression for decisions: the mixture of all draws after calibration.

It uses only torch operations, so that decisions are part of the compiled prediction.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vbdl.likelihoods.mixture import averaged, mixture_quantile, mixture_score
from vbdl.likelihoods.normal_mixture import RegressionPrediction
from vbdl.metrics.intervals import normal_cdf
from vbdl.types import Prediction, Recalibration

_NODES = 64  # nodes of the Gauss-Legendre rule for recalibrated distributions, relative error 1e-5


class Distribution:
    """A mixture of normal distributions, (samples, batch, ...), whose distribution function may be recalibrated.

    components: (samples, batch, ..., 2), mean and log-variance.
    weights: (samples,), summing to one; equal by default.
    """

    def __init__(self, components: Tensor, weights: Tensor | None = None, recalibration: Recalibration | None = None):
        mean, log_variance = components.to(torch.float64).unbind(-1)
        self.mean, self.std, self.weights = mean, (0.5 * log_variance).exp(), weights
        self.recalibration = recalibration

    def quantile(self, level: float) -> Tensor:
        """The quantile of y at this level in (0, 1): (batch, ...)."""
        score = torch.full((), float(stats.norm.ppf(level)), dtype=torch.float64, device=self.mean.device)
        if self.recalibration is not None:
            score = self.recalibration.inverse(score)
        return mixture_quantile(self.mean, self.std, score, self.weights)

    def mean_below(self, quantile: Tensor, level: float) -> Tensor:
        """The mean of y below `quantile`, which must be its quantile at `level`: (batch, ...)."""
        if self.recalibration is None:
            z = (quantile - self.mean) / self.std
            density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
            # computed from the shortfall below the quantile, which avoids cancellation for targets of large magnitude
            short = (quantile - self.mean) * normal_cdf(z) + self.std * density
            return quantile - averaged(short, self.weights) / level
        far, weight = self._nodes(quantile)
        return quantile - (weight * self._level(quantile - far, -1)).sum(0) / level

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean and variance of y, (batch, ...) each."""
        mean = averaged(self.mean, self.weights)
        if self.recalibration is None:
            return mean, averaged(self.std.square() + (self.mean - mean).square(), self.weights)
        # integration by parts around the median c: E(y - c) = ∫ P(y > c + t) - P(y < c - t) dt
        center = self.quantile(0.5)
        far, weight = self._nodes(center)
        above, below = self._level(center + far, 1), self._level(center - far, -1)
        first = (weight * (above - below)).sum(0)
        second = 2 * (weight * far * (above + below)).sum(0)
        return center + first, second - first.square()

    def moved(self, y: Tensor) -> Tensor:
        """The value whose level before recalibration equals the level of y after it: (batch, ...)."""
        if self.recalibration is None:
            return y
        y = y.to(torch.float64).expand(self.mean.shape[1:])
        score = self.recalibration.score(mixture_score(self.mean, self.std, y, self.weights))
        return mixture_quantile(self.mean, self.std, score, self.weights)

    def _level(self, y: Tensor, side: int) -> Tensor:
        """P(Y < y) for side -1, P(Y > y) for side 1; y: (nodes, batch, ...)."""
        assert self.recalibration is not None
        score = mixture_score(self.mean.unsqueeze(1), self.std.unsqueeze(1), y, self.weights)
        return normal_cdf(-side * self.recalibration.score(score))

    def _nodes(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """(distances of the nodes from `start`, weights) of an integral to infinity, (nodes, batch, ...) each."""
        t, w = (torch.from_numpy(a).to(start.device) for a in np.polynomial.legendre.leggauss(_NODES))
        t, w = (t + 1) / 2, w / 2
        spread = averaged(self.std.square() + (self.mean - averaged(self.mean, self.weights)).square(), self.weights)
        shape = (-1, *[1] * start.ndim)
        scale = 2 * spread.sqrt()
        return (t / (1 - t)).reshape(shape) * scale, (w / (1 - t) ** 2).reshape(shape) * scale


class Evidence(SimpleNamespace):
    """The fields of a prediction that a decision inside a predictor reads, under the prediction's names.

    label: the predicted class, (batch, ...) int64. distribution, per_draw, distance: set only if the decision requests
    them.
    """

    distribution: Distribution | None = None
    distance: Tensor | None = None
    per_draw: Tensor | None = None

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(
            f"the decision reads {name!r}, but the prediction has only {', '.join(vars(self))}: use Referral and "
            "ExpectedCost for classes, Risk for a regression"
        )


def distribution_of(prediction: Prediction | Evidence) -> Distribution | None:
    """The predictive distribution of a regression, inside a predictor or from a prediction's samples, or None.

    None for other likelihoods than mixtures of normal distributions, whose parameters mean something else.
    """
    if isinstance(prediction, Evidence):
        return prediction.distribution
    if prediction.samples is None or not isinstance(prediction, RegressionPrediction):
        return None
    return Distribution(prediction.samples, recalibration=prediction.recalibration)
