"""The predictive distribution of a regression that decisions read: the mixture of all draws, after calibration.

In plain torch, so that it is part of the compiled prediction.
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vbdl.likelihoods.mixture import averaged, mixture_quantile, mixture_score
from vbdl.metrics.intervals import normal_cdf
from vbdl.types import Prediction, Recalibration

_NODES = 64  # of the Gauss-Legendre rule for integrals of a recalibrated distribution function, 1e-5 of them


class Distribution:
    """An equal mixture of normals, (samples, batch, ...), whose distribution function may be recalibrated.

    weights: (samples,), summing to one, where some of the samples are empty places.
    """

    def __init__(self, components: Tensor, weights: Tensor | None = None, recalibration: Recalibration | None = None):
        mean, log_variance = components.to(torch.float64).unbind(-1)
        self.mean, self.std, self.weights = mean, (0.5 * log_variance).exp(), weights
        self.recalibration = recalibration

    def quantile(self, level: float) -> Tensor:
        """(batch, ...) the value that y is at most with this probability."""
        score = torch.full((), float(stats.norm.ppf(level)), dtype=torch.float64, device=self.mean.device)
        if self.recalibration is not None:
            score = self.recalibration.inverse(score)
        return mixture_quantile(self.mean, self.std, score, self.weights)

    def mean_below(self, quantile: Tensor, level: float) -> Tensor:
        """(batch, ...) the mean of y below its quantile of this level, which is given too."""
        if self.recalibration is None:
            z = (quantile - self.mean) / self.std
            density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
            # by what falls short of the quantile, which is small where the targets are large
            short = (quantile - self.mean) * normal_cdf(z) + self.std * density
            return quantile - averaged(short, self.weights) / level
        far, weight = self._nodes(quantile)
        return quantile - (weight * self._level(quantile - far, -1)).sum(0) / level

    def moments(self) -> tuple[Tensor, Tensor]:
        """(batch, ...) mean and variance."""
        mean = averaged(self.mean, self.weights)
        if self.recalibration is None:
            return mean, averaged(self.std.square() + (self.mean - mean).square(), self.weights)
        # by parts, around a point in the middle: E(y - c) = ∫ P(y > c + t) - P(y < c - t) dt
        center = self.quantile(0.5)
        far, weight = self._nodes(center)
        above, below = self._level(center + far, 1), self._level(center - far, -1)
        first = (weight * (above - below)).sum(0)
        second = 2 * (weight * far * (above + below)).sum(0)
        return center + first, second - first.square()

    def moved(self, y: Tensor) -> Tensor:
        """(batch, ...) the value of the mixture before recalibration that has the level of y after it."""
        if self.recalibration is None:
            return y
        y = y.to(torch.float64).expand(self.mean.shape[1:])
        score = self.recalibration.score(mixture_score(self.mean, self.std, y, self.weights))
        return mixture_quantile(self.mean, self.std, score, self.weights)

    def _level(self, y: Tensor, side: int) -> Tensor:
        """P(below y) for side -1, P(above y) for 1; y: (nodes, batch, ...)"""
        assert self.recalibration is not None
        score = mixture_score(self.mean.unsqueeze(1), self.std.unsqueeze(1), y, self.weights)
        return normal_cdf(-side * self.recalibration.score(score))

    def _nodes(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes, as distances from `start`, and weights of an integral to infinity, (nodes, batch, ...) each."""
        t, w = (torch.from_numpy(a).to(start.device) for a in np.polynomial.legendre.leggauss(_NODES))
        t, w = (t + 1) / 2, w / 2
        spread = averaged(self.std.square() + (self.mean - averaged(self.mean, self.weights)).square(), self.weights)
        shape = (-1, *[1] * start.ndim)
        scale = 2 * spread.sqrt()
        return (t / (1 - t)).reshape(shape) * scale, (w / (1 - t) ** 2).reshape(shape) * scale


class Evidence(SimpleNamespace):
    """What a decision inside a predictor is given: the fields of the prediction so far, under the same names.

    label: of classes, (batch, ...) int64. distribution, per_draw: for a decision that reads them.
    """

    distribution: Distribution | None = None
    per_draw: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the decision asks for {name!r} of a prediction that has {', '.join(vars(self))}: Referral and "
            "ExpectedCost decide on classes, Risk on a regression"
        )


def distribution_of(prediction: Prediction | Evidence) -> Distribution | None:
    """The distribution that a decision is given inside a predictor, or that of a prediction's samples; None without."""
    if isinstance(prediction, Evidence):
        return prediction.distribution
    if prediction.samples is None:
        return None
    return Distribution(prediction.samples, recalibration=prediction.recalibration)
