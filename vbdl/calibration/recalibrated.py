"""The prediction of a predictor whose distribution function was recalibrated."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vbdl.likelihoods.mixture import mixture_quantile
from vbdl.likelihoods.normal_mixture import RegressionPrediction, as_columns, normal_nll
from vbdl.metrics.intervals import normal_cdf


class Recalibrations:
    """Maps of the distribution function one after the other: what was recalibrated is recalibrated again."""

    of_steps = False

    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second

    def score(self, score: Tensor) -> Tensor:
        return self.second.score(self.first.score(score))

    def inverse(self, score: Tensor) -> Tensor:
        return self.first.inverse(self.second.inverse(score))

    def log_slope(self, score: Tensor) -> Tensor:
        return self.first.log_slope(score) + self.second.log_slope(self.first.score(score))


@dataclass(frozen=True)
class RecalibratedPrediction(RegressionPrediction):
    """A mixture with a recalibrated distribution function: cdf, quantile, interval and log_prob are the new ones.

    mean, total, aleatoric and epistemic stay those of the mixture: the map moves probability between its quantiles, and
    says nothing about which part of the spread is epistemic. How the elements of a row depend on each other stays too
    (their copula).
    """

    recalibration: Any = None

    def score(self, y: Tensor) -> Tensor:
        return self.recalibration.score(super().score(y))

    def cdf(self, y: Tensor) -> Tensor:
        if self.recalibration.of_steps:
            return self.recalibration(super().cdf(y))
        return normal_cdf(self.score(y)).to(torch.promote_types(torch.as_tensor(y).dtype, self.mean.dtype))

    def quantile(self, q: float | Tensor) -> Tensor:
        levels = self._levels(q)
        if self.recalibration.of_steps:
            # in the mixture's own precision a level next to 1 may round to it
            tiny = torch.finfo(self.mean.dtype).eps / 4
            asked = self.recalibration.level(levels).clamp(tiny, 1 - 2 * tiny).to(self.mean.dtype)
            return self._quantile_of_score(torch.special.ndtri(asked.to(torch.float64)))
        return self._quantile_of_score(self.recalibration.inverse(torch.special.ndtri(levels)))

    def log_prob(self, y: Tensor) -> Tensor:
        """(batch,) log density, nats, joint over a row's elements.

        y' has the density of the mixture at the y of the same level, times dy / dy' of each element.
        """
        components = self._components()
        y = as_columns(torch.as_tensor(y, device=components.device), components.shape[1:-1])
        if self.recalibration.of_steps:
            slope = self.recalibration.slope(super().cdf(y))
            return super().log_prob(y) + slope.log().flatten(1).sum(1)
        score = super().score(y)
        slope = self.recalibration.log_slope(score)
        if components.shape[0] == 1 or y[:1].numel() <= 1:  # elements that do not depend on each other
            return super().log_prob(y) + slope.flatten(1).sum(1).to(y.dtype)
        mean, std = self._mean_std()
        moved = mixture_quantile(mean, std, self.recalibration.score(score))
        apart = _log_density(components, y) - _log_density(components, moved)
        return (super().log_prob(moved) + (slope + apart).flatten(1).sum(1)).to(y.dtype)


def _log_density(components: Tensor, y: Tensor) -> Tensor:
    """(samples, batch, ..., 2), (batch, ...) -> (batch, ...) log density of each element alone, but for a constant"""
    return torch.logsumexp(-normal_nll(components.to(torch.float64), y), dim=0)


def recalibrated(prediction: RegressionPrediction, recalibration: Any) -> RecalibratedPrediction:
    """The prediction with this map on top of those that it has."""
    before = getattr(prediction, "recalibration", None)
    values = {f.name: getattr(prediction, f.name) for f in fields(RegressionPrediction)}
    made = recalibration if before is None else Recalibrations(before, recalibration)
    return RecalibratedPrediction(**values, recalibration=made)
