"""The predictive of Gaussian outputs: an equal mixture of one normal a sample, kept as what it is.

Scales are never averaged: two members at -5 and +5 with std 0.1 predict a std of 5. Variances add by the law of
total variance; density, distribution function and quantiles are the mixture's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vbdl.likelihoods.moments import merge_moments, moments, per_row, standard_error
from vbdl.types import State

LOG_VARIANCE_BOUND = 40.0  # exp(+-40), stds of 2e-9 to 5e8, and its square are normal numbers of float32


def check_spread(std: float, what: str) -> None:
    """ValueError where noise as large as these targets' standard deviation cannot be said."""
    low, high = math.exp(-LOG_VARIANCE_BOUND / 2), math.exp(LOG_VARIANCE_BOUND / 2)
    if not low < std < high:
        raise ValueError(
            f"{what} has a standard deviation of {std:.3g}, and noise is modelled between {low:.0e} and {high:.0e}: "
            f"rescale it, to another unit or by a power of ten, so that this is about 1"
        )


@dataclass(frozen=True)
class RegressionPrediction:
    """p(y | x), an equal mixture of normals. Variances are in squared target units."""

    mean: Tensor  # (batch, outputs)
    total: Tensor  # (batch, outputs) variance: aleatoric + epistemic
    aleatoric: Tensor  # (batch, outputs) mean of the samples' noise variances
    epistemic: Tensor  # (batch, outputs) variance of the samples' means
    standard_error: Tensor  # (batch, outputs) Monte Carlo standard error of mean
    n_samples: int
    covariance: Tensor | None = None  # (batch, outputs, outputs) total, where asked for
    samples: Tensor | None = None  # (samples, batch, outputs, 2) mean and log-variance, where asked for

    @property
    def std(self) -> Tensor:
        """(batch, outputs) predictive standard deviation."""
        return self.total.sqrt()

    def log_prob(self, y: Tensor) -> Tensor:
        """(batch,) log density of the mixture in nats; y: (batch, outputs), or (batch,) for one output."""
        components = self._components()
        y = as_columns(torch.as_tensor(y, device=components.device), components.shape[1:-1])
        each = normal_nll(components, y).flatten(2).sum(2)
        return torch.logsumexp(-each, dim=0) - math.log(components.shape[0])

    def cdf(self, y: Tensor) -> Tensor:
        """(..., batch, outputs) probability of at most y, for each output on its own."""
        mean, std = self._mean_std()
        return torch.special.ndtr((y.unsqueeze(-3) - mean) / std).mean(-3)

    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantiles of the mixture, by bisection of its distribution function, for each output on its own.

        q: () or (levels,), in (0, 1)  ->  (batch, outputs) or (levels, batch, outputs)
        """
        mean, std = self._mean_std()
        levels = torch.as_tensor(q, dtype=mean.dtype, device=mean.device)
        if bool(((levels <= 0) | (levels >= 1)).any()):
            raise ValueError(f"quantile levels lie strictly between 0 and 1, got {q}")
        target = levels.reshape(-1, 1, 1)
        # a quantile of the mixture lies between the same quantile of its components
        each = mean + std * torch.special.ndtri(target).unsqueeze(1)
        low, high = each.amin(1), each.amax(1)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        middle = (low + high) / 2
        return middle[0] if levels.ndim == 0 else middle

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """(batch, outputs) bounds of the central interval that holds y with this probability."""
        if not 0 <= level < 1:
            raise ValueError(f"the level of an interval is a probability below 1, got {level}: 0.9 for 90 %")
        low, high = self.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
        return low, high

    def _components(self) -> Tensor:
        if self.samples is None:
            raise ValueError("the mixture's components were not kept: predict with predict(x, samples=True)")
        return self.samples

    def _mean_std(self) -> tuple[Tensor, Tensor]:
        mean, log_variance = self._components().unbind(-1)
        return mean, (0.5 * log_variance).exp()


def as_columns(y: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Targets (batch,) or (batch, outputs) as (batch, outputs), or ValueError."""
    if y.ndim == 1 and len(shape) == 2 and shape[-1] == 1:
        y = y.unsqueeze(-1)
    if tuple(y.shape) != tuple(shape):
        raise ValueError(f"targets {tuple(y.shape)} do not fit outputs {tuple(shape)}")
    return y


def check_regression_targets(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """y as float (batch, outputs), or ValueError where it is not finite or of another shape."""
    if y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"regression targets are real numbers, got {y.dtype}")
    y = as_columns(y if y.is_floating_point() else y.to(torch.float32), shape)
    if not bool(y.isfinite().all()):
        row = int((~y.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"target of row {row} is not finite; remove or impute such rows")
    return y


def columns(outputs: Tensor) -> Tensor:
    """(batch,) as (batch, 1); anything wider as it is."""
    return outputs.unsqueeze(-1) if outputs.ndim == 1 else outputs


def normal_nll(parameters: Tensor, y: Tensor) -> Tensor:
    """(..., 2) mean and log-variance, (...) -> (...) nats, each output's; leading axes broadcast."""
    mean, log_variance = parameters.to(torch.promote_types(parameters.dtype, torch.float32)).unbind(-1)
    return 0.5 * (math.log(2 * math.pi) + log_variance + (y - mean).square() * (-log_variance).exp())


class NormalLikelihood(nn.Module):
    """What every likelihood of normals shares: all but how outputs become means and log-variances.

    covariance: predictions carry the covariance between outputs, (batch, outputs, outputs).
    """

    def __init__(self, covariance: bool = False):
        super().__init__()
        self.covariance = covariance

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return check_regression_targets(y, tuple(parameters_shape[:-1]))

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """(batch, outputs, 2), (batch, outputs) -> (batch,) nats"""
        return per_row(normal_nll(parameters, y))

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.nll(parameters, y)

    def summarize(self, parameters: Tensor) -> State:
        """(samples, batch, outputs, 2) mean and log-variance -> running sums"""
        mean, log_variance = parameters.to(torch.promote_types(parameters.dtype, torch.float32)).unbind(-1)
        n, centre, deviation = moments(mean)
        summary = {"n": n, "mean": centre, "deviation": deviation, "aleatoric": log_variance.exp().mean(0)}
        if self.covariance:
            apart = mean - centre
            summary["products"] = torch.einsum("sbi,sbj->bij", apart, apart)
        return summary

    def merge(self, a: State, b: State) -> State:
        merged = merge_moments(a, b, "mean", "aleatoric")
        if "products" in a:
            apart = b["mean"] - a["mean"]
            weight = a["n"] * b["n"] / merged["n"]
            merged["products"] = a["products"] + b["products"] + weight * apart.unsqueeze(-1) * apart.unsqueeze(-2)
        return merged

    def finish(self, summary: State) -> State:
        n, aleatoric = summary["n"], summary["aleatoric"]
        epistemic = summary["deviation"] / n  # of the mixture of these n samples, hence not n - 1
        fields = {
            "mean": summary["mean"],
            "total": aleatoric + epistemic,
            "aleatoric": aleatoric,
            "epistemic": epistemic,
            "standard_error": standard_error(n, summary["deviation"]),
        }
        if "products" in summary:
            fields["covariance"] = summary["products"] / n + torch.diag_embed(aleatoric)
        return fields

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> RegressionPrediction:
        return RegressionPrediction(**fields, n_samples=n_samples, samples=samples)
