"""Predictions with a recalibrated distribution function."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vbdl.calibration.steps import Steps
from vbdl.likelihoods.mixture import mixture_quantile
from vbdl.likelihoods.normal_mixture import RegressionPrediction, as_columns, normal_nll
from vbdl.metrics.intervals import normal_cdf
from vbdl.types import Recalibration


@dataclass(frozen=True)
class Recalibrations:
    """The composition of two recalibrations: `second` is applied to the result of `first`."""

    first: Recalibration
    second: Recalibration

    def score(self, score: Tensor) -> Tensor:
        return self.second.score(self.first.score(score))

    def inverse(self, score: Tensor) -> Tensor:
        return self.first.inverse(self.second.inverse(score))

    def log_slope(self, score: Tensor) -> Tensor:
        return self.first.log_slope(score) + self.second.log_slope(self.first.score(score))


@dataclass(frozen=True, kw_only=True)
class RecalibratedPrediction(RegressionPrediction):
    """A mixture with a recalibrated distribution function, which cdf, quantile, interval and log_prob use.

    mean, total, aleatoric and epistemic stay those of the mixture, because the recalibration does not tell which part
    of the spread is epistemic. The dependence between the outputs of a row (their copula) stays, too.
    """

    recalibration: Recalibration  # of the mixture's distribution function

    def score(self, y: Tensor) -> Tensor:
        return self.recalibration.score(super().score(y))

    def cdf(self, y: Tensor) -> Tensor:
        if isinstance(self.recalibration, Steps):
            return self.recalibration(super().cdf(y))
        return normal_cdf(self.score(y)).to(torch.promote_types(torch.as_tensor(y).dtype, self.mean.dtype))

    def quantile(self, q: float | Tensor) -> Tensor:
        levels = self._levels(q)
        if isinstance(self.recalibration, Steps):
            # in the mixture's dtype a level close to 1 may round to 1
            tiny = torch.finfo(self.mean.dtype).eps / 4
            asked = self.recalibration.level(levels).clamp(tiny, 1 - 2 * tiny).to(self.mean.dtype)
            return self._quantile_of_score(torch.special.ndtri(asked.to(torch.float64)))
        return self._quantile_of_score(self.recalibration.inverse(torch.special.ndtri(levels)))

    def log_prob(self, y: Tensor) -> Tensor:
        """The joint log density of a row's outputs, nats, (batch,).

        The density at y' is that of the mixture at the y of the same level, times dy / dy' of each output.
        """
        components = self._components()
        y = as_columns(torch.as_tensor(y, device=components.device), components.shape[1:-1])
        if isinstance(self.recalibration, Steps):
            slope = self.recalibration.slope(super().cdf(y))
            return super().log_prob(y) + slope.log().flatten(1).sum(1)
        score = super().score(y)
        slope = self.recalibration.log_slope(score)
        if components.shape[0] == 1 or y[:1].numel() <= 1:  # independent outputs
            return super().log_prob(y) + slope.flatten(1).sum(1).to(y.dtype)
        mean, std = self.normals()
        moved = mixture_quantile(mean, std, self.recalibration.score(score))
        apart = _log_density(components, y) - _log_density(components, moved)
        return (super().log_prob(moved) + (slope + apart).flatten(1).sum(1)).to(y.dtype)


def _log_density(components: Tensor, y: Tensor) -> Tensor:
    """The log density of each output alone, (batch, ...), up to a constant. components: (samples, batch, ..., 2)"""
    return torch.logsumexp(-normal_nll(components.to(torch.float64), y), dim=0)


def recalibrated(prediction: RegressionPrediction, recalibration: Recalibration) -> RecalibratedPrediction:
    """The prediction with this recalibration applied after the one it already has, if any."""
    before = prediction.recalibration
    values = {f.name: vars(prediction)[f.name] for f in fields(RegressionPrediction)}
    both = recalibration if before is None else Recalibrations(before, recalibration)
    return RecalibratedPrediction(**values, recalibration=both)
