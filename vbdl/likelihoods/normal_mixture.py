"""The predictive of Gaussian outputs: an equal mixture of one normal a sample, kept as what it is.

Scales are never averaged: two members at -5 and +5 with std 0.1 predict a std of 5. Variances add by the law of
total variance; density, distribution function and quantiles are the mixture's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.likelihoods.mixture import mixture_quantile, mixture_score
from vbdl.likelihoods.moments import merge_moments, moments, per_row, standard_error
from vbdl.likelihoods.targets import check_labeled
from vbdl.types import Likelihood, Prediction, State

LOG_VARIANCE_BOUND = 40.0  # exp(+-40), stds of 2e-9 to 5e8, and its square are normal numbers of float32


def check_spread(std: float, what: str) -> None:
    """Raises ValueError if std is outside the range of noise levels the likelihood can represent (2e-9 to 5e8)."""
    low, high = math.exp(-LOG_VARIANCE_BOUND / 2), math.exp(LOG_VARIANCE_BOUND / 2)
    if not low < std < high:
        raise ValueError(
            f"{what} has a standard deviation of {std:.3g}, and noise is modeled between {low:.0e} and {high:.0e}: "
            f"rescale it, to another unit or by a power of ten, so that this is about 1"
        )


@dataclass(frozen=True, kw_only=True)
class RegressionPrediction(Prediction):
    """p(y | x), an equal mixture of normals. Variances are in squared target units.

    total is aleatoric, the mean of the samples' noise variances, plus epistemic, the variance of the samples' means.
    samples are (samples, batch, ..., 2) mean and log-variance. Axes behind the batch are those of the targets: (batch,
    outputs), (batch, time, outputs), (batch, channels, height, width) and so on. Everything but log_prob is of each
    element on its own.
    """

    mean: Tensor  # (batch, ...)
    covariance: Tensor | None = None  # (batch, ..., outputs, outputs) total, between outputs, where asked for
    output_axis: int = -1  # the axis of the mean that holds the outputs, counted from the end

    @property
    def std(self) -> Tensor:
        """(batch, ...) predictive standard deviation."""
        return self.total.sqrt()

    @property
    def parameters_shape(self) -> tuple[int, ...]:
        """(batch, ..., 2), mean and log-variance."""
        return (*self.mean.shape, 2)

    def log_prob(self, y: Tensor) -> Tensor:
        """(batch,) log density of the mixture in nats, joint over a row's elements; y: (batch, ...), or (batch,) for
        one output."""
        components = self._components()
        y = as_columns(torch.as_tensor(y, device=components.device), components.shape[1:-1])
        each = normal_nll(components, y).flatten(2).sum(2)
        return torch.logsumexp(-each, dim=0) - math.log(components.shape[0])

    def cdf(self, y: Tensor) -> Tensor:
        """Probability of at most y, for each element on its own.

        y: (..., batch, ...), with any axes in front of the batch (several y for each row), or (batch,) for one output
        """
        mean, std = self.normals()
        y = self._elements(y)
        axes = mean.ndim - 1
        return torch.special.ndtr((y.unsqueeze(-(axes + 1)) - mean) / std).mean(-(axes + 1))

    def score(self, y: Tensor) -> Tensor:
        """Φ⁻¹ of the probability of at most y, for each element on its own, float64: standard normal for y of a
        calibrated prediction, with digits where the probability rounds to 0 or 1. y: as for cdf."""
        mean, std = self.normals()
        y = self._elements(y)
        several = y.shape[: y.ndim - mean.ndim + 1]
        for _ in several:
            mean, std = mean.unsqueeze(1), std.unsqueeze(1)
        return mixture_score(mean, std, y)

    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantiles of the mixture, by bisection of its distribution function, for each element on its own.

        q: () or (levels,), in (0, 1)  ->  (batch, ...) or (levels, batch, ...)
        """
        return self._quantile_of_score(torch.special.ndtri(self._levels(q)))

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """(batch, ...) bounds of the central interval that holds y with this probability."""
        if not 0 <= level < 1:
            raise ValueError(f"the level of an interval is a probability below 1, got {level}: 0.9 for 90 %")
        low, high = self.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
        return low, high

    def _levels(self, q: float | Tensor) -> Tensor:
        levels = torch.as_tensor(q, dtype=torch.float64, device=self.mean.device)
        if levels.ndim > 1:
            raise ValueError(f"quantile levels are one number or (levels,), got {tuple(levels.shape)}")
        if not bool(((levels > 0) & (levels < 1)).all()):
            raise ValueError(f"quantile levels lie strictly between 0 and 1, got {q}")
        return levels

    def _quantile_of_score(self, score: Tensor) -> Tensor:
        """The quantile of level Φ(score); score: () or (levels,), float64."""
        mean, std = self.normals()
        each = [mixture_quantile(mean, std, one).to(mean.dtype) for one in score.reshape(-1)]
        return each[0] if score.ndim == 0 else torch.stack(each) if each else mean.new_empty(0, *mean.shape[1:])

    def _elements(self, y: Tensor) -> Tensor:
        """y, whose last axes must be those of the mean; ValueError if not, instead of broadcasting by position."""
        shape = self._components().shape[1:-1]
        y = torch.as_tensor(y, device=self.mean.device)
        if y.ndim == 1 and len(shape) == 2 and shape[-1] == 1:
            y = y.unsqueeze(-1)
        elements = y.shape[y.ndim - len(shape) :]
        if y.ndim < len(shape) or any(n not in (1, size) for n, size in zip(elements, shape, strict=True)):
            raise ValueError(f"y is {tuple(y.shape)}, and the prediction {tuple(shape)}: give one y for each element")
        return y

    def _components(self) -> Tensor:
        if self.samples is None:
            raise ValueError("the mixture's components were not kept: predict with predict(x, samples=True)")
        return self.samples

    def normals(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each draw's normal, (samples, batch, ...); ValueError without samples."""
        mean, log_variance = self._components().unbind(-1)
        return mean, (0.5 * log_variance).exp()


def as_columns(y: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Targets (batch, ...) as they are, or (batch,) as (batch, 1) for one output; ValueError for another shape."""
    if y.ndim == 1 and len(shape) == 2 and shape[-1] == 1:
        y = y.unsqueeze(-1)
    if tuple(y.shape) != tuple(shape):
        raise ValueError(f"targets {tuple(y.shape)} do not fit outputs {tuple(shape)}")
    return y


def check_regression_targets(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """y as float (batch, ...), or ValueError where it is not finite or of another shape."""
    if y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"regression targets are real numbers, got {y.dtype}")
    y = as_columns(y if y.is_floating_point() else y.to(torch.float32), shape)
    check_labeled(y)
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


class NormalLikelihood(Likelihood):
    """The base of likelihoods of normals: a subclass maps outputs to means and log-variances in `forward`.

    covariance: predictions carry the covariance between outputs, (batch, ..., outputs, outputs).
    channel_axis: the axis of the network's outputs that holds them, the batch being 0: 1 for images (batch, channels,
        height, width), -1 for the last. Not needed for up to three axes, where it is the last; with more it is.
    """

    channel_axis: int | None = None  # of what was pickled before there was one

    def __init__(self, covariance: bool = False, channel_axis: int | None = None):
        super().__init__()
        if channel_axis == 0:
            raise ValueError("channel_axis is not 0, which is the batch: 1 for images (batch, channels, height, width)")
        self.covariance, self.channel_axis = covariance, channel_axis

    def extra_repr(self) -> str:
        return "" if self.channel_axis is None else f"channel_axis={self.channel_axis}"

    def output_axis(self, axes: int) -> int:
        """The axis of the outputs, counted from the end, of network outputs with so many axes, the batch included.

        ValueError where it was not named and is not clear: taken for the last, the columns of an image would each be an
        output, with a noise level of its own.
        """
        name = type(self).__name__
        if self.channel_axis is None:
            if axes > 3:
                raise ValueError(
                    f"the module returned {axes} axes, and which one holds the outputs was not said: name the axis, "
                    f"vbdl.{name}(channel_axis=1) for images (batch, channels, height, width), channel_axis=-1 for the "
                    f"last axis"
                )
            return -1
        if not 1 - axes <= self.channel_axis < axes:
            raise ValueError(f"{name}(channel_axis={self.channel_axis}), and the module returned {axes} axes")
        return self.channel_axis if self.channel_axis < 0 else self.channel_axis - axes

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return check_regression_targets(y, tuple(parameters_shape[:-1]))

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """(batch, ..., 2), (batch, ...) -> (batch,) nats, summed over a row's elements"""
        return per_row(normal_nll(parameters, y))

    def summarize(self, parameters: Tensor) -> State:
        """(samples, batch, ..., 2) mean and log-variance -> running sums"""
        mean, log_variance = parameters.to(torch.promote_types(parameters.dtype, torch.float32)).unbind(-1)
        n, center, deviation = moments(mean)
        summary = {"n": n, "mean": center, "deviation": deviation, "aleatoric": log_variance.exp().mean(0)}
        if self.covariance:
            apart = self._outputs_last(mean - center, mean.ndim - 1)
            summary["products"] = torch.einsum("s...i,s...j->...ij", apart, apart)
        return summary

    def merge(self, a: State, b: State) -> State:
        merged = merge_moments(a, b, "mean", "aleatoric")
        if "products" in a:
            apart = self._outputs_last(b["mean"] - a["mean"], a["mean"].ndim)
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
            noise = torch.diag_embed(self._outputs_last(aleatoric, aleatoric.ndim))
            fields["covariance"] = summary["products"] / n + noise
        return fields

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> RegressionPrediction:
        axis = self._axis(fields["mean"].ndim)
        return RegressionPrediction(**fields, n_samples=n_samples, samples=samples, output_axis=axis)

    def _axis(self, axes: int) -> int:
        """The axis of the outputs among the axes that the network returned, counted from the end."""
        return -1 if self.channel_axis is None else self.output_axis(axes)

    def _outputs_last(self, values: Tensor, axes: int) -> Tensor:
        """The values with the outputs axis moved last; axes: how many the outputs have, samples not counted."""
        axis = self._axis(axes)
        return values if axis == -1 else values.movedim(axis, -1)
