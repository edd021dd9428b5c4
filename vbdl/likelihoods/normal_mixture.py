"""The predictive distribution of Gaussian outputs: an equal mixture with one normal per sample.

Stds are never averaged: two members at -5 and +5 with std 0.1 predict a std of 5. Variances add by the law of total
variance; density, distribution function and quantiles are those of the mixture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.likelihoods.mixture import mixture_quantile, mixture_score
from vbdl.likelihoods.moments import merge_moments, moments, per_row, standard_error, wide
from vbdl.likelihoods.targets import check_labeled
from vbdl.types import Likelihood, Prediction, State

LOG_VARIANCE_BOUND = 40.0  # stds of 2e-9 to 5e8: exp(+-40) and its square are normal numbers of float32


def check_spread(std: float, what: str) -> None:
    """Raise ValueError if std is outside the range of noise levels the likelihood can represent (2e-9 to 5e8).

    what: the name of the data in the error.
    """
    low, high = math.exp(-LOG_VARIANCE_BOUND / 2), math.exp(LOG_VARIANCE_BOUND / 2)
    if not low < std < high:
        raise ValueError(
            f"{what} has a standard deviation of {std:.3g}, but noise is modeled between {low:.0e} and {high:.0e}: "
            f"rescale it, to another unit or by a power of ten, to a standard deviation of about 1"
        )


@dataclass(frozen=True, kw_only=True)
class RegressionPrediction(Prediction):
    """The predictive distribution p(y | x) as an equal mixture of normals. Variances are in squared target units.

    total is aleatoric, the mean of the samples' noise variances, plus epistemic, the variance of the samples' means.
    samples are (samples, batch, ..., 2) mean and log-variance. Axes after the batch are those of the targets: (batch,
    outputs), (batch, time, outputs), (batch, channels, height, width) and so on. Every method but log_prob treats each
    element separately.
    """

    mean: Tensor  # (batch, ...)
    covariance: Tensor | None = None  # (batch, ..., outputs, outputs) total between outputs, if requested
    output_axis: int = -1  # the axis of the mean that holds the outputs, counted from the end

    @property
    def std(self) -> Tensor:
        """The predictive standard deviation, (batch, ...)."""
        return self.total.sqrt()

    @property
    def parameters_shape(self) -> tuple[int, ...]:
        """The shape of one draw's means and log-variances, (batch, ..., 2)."""
        return (*self.mean.shape, 2)

    def log_prob(self, y: Tensor) -> Tensor:
        """The log density of the mixture, (batch,), in nats, joint over a row's elements.

        y: (batch, ...), or (batch,) for one output.
        """
        components = self._components()
        y = as_columns(torch.as_tensor(y, device=components.device), components.shape[1:-1])
        each = normal_nll(components, y).flatten(2).sum(2)
        return torch.logsumexp(-each, dim=0) - math.log(components.shape[0])

    def cdf(self, y: Tensor) -> Tensor:
        """The probability of at most y for each element, (..., batch, ...).

        y: (..., batch, ...), with any axes before the batch (several y for each row), or (batch,) for one output.
        """
        mean, std = self.normals()
        y = self._elements(y)
        axes = mean.ndim - 1
        return torch.special.ndtr((y.unsqueeze(-(axes + 1)) - mean) / std).mean(-(axes + 1))

    def score(self, y: Tensor) -> Tensor:
        """The normal score Φ⁻¹(cdf(y)) of each element, float64; standard normal if the prediction is calibrated.

        It is precise even if the probability rounds to 0 or 1. y: as for cdf.
        """
        mean, std = self.normals()
        y = self._elements(y)
        several = y.shape[: y.ndim - mean.ndim + 1]
        for _ in several:
            mean, std = mean.unsqueeze(1), std.unsqueeze(1)
        return mixture_score(mean, std, y)

    def quantile(self, q: float | Tensor) -> Tensor:
        """The quantiles of the mixture for each element, by bisection of its distribution function.

        q: () or (levels,), in (0, 1); the quantiles are (batch, ...) or (levels, batch, ...).
        """
        return self._quantile_of_score(torch.special.ndtri(self._levels(q)))

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The bounds of the central interval that holds y with probability `level`, (batch, ...) each."""
        if not 0 <= level < 1:
            raise ValueError(f"the level of an interval must be a probability below 1, got {level}: give 0.9 for 90 %")
        low, high = self.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
        return low, high

    def _levels(self, q: float | Tensor) -> Tensor:
        levels = torch.as_tensor(q, dtype=torch.float64, device=self.mean.device)
        if levels.ndim > 1:
            raise ValueError(f"quantile levels must be one number or (levels,), got {tuple(levels.shape)}")
        if not bool(((levels > 0) & (levels < 1)).all()):
            raise ValueError(f"quantile levels must lie strictly between 0 and 1, got {q}")
        return levels

    def _quantile_of_score(self, score: Tensor) -> Tensor:
        """The quantiles at level Φ(score); score: () or (levels,), float64."""
        mean, std = self.normals()
        each = [mixture_quantile(mean, std, one).to(mean.dtype) for one in score.reshape(-1)]
        return each[0] if score.ndim == 0 else torch.stack(each) if each else mean.new_empty(0, *mean.shape[1:])

    def _elements(self, y: Tensor) -> Tensor:
        """The targets, (..., batch, ...). Raises ValueError if their last axes do not fit the mean's shape.

        (Without this check they might broadcast by position.)
        """
        shape = self._components().shape[1:-1]
        y = torch.as_tensor(y, device=self.mean.device)
        if y.ndim == 1 and len(shape) == 2 and shape[-1] == 1:
            y = y.unsqueeze(-1)
        elements = y.shape[y.ndim - len(shape) :]
        if y.ndim < len(shape) or any(n not in (1, size) for n, size in zip(elements, shape, strict=True)):
            raise ValueError(f"y is {tuple(y.shape)} but the prediction {tuple(shape)}: give one y for each element")
        return y

    def _components(self) -> Tensor:
        if self.samples is None:
            raise ValueError("the mixture's components were not kept: predict with predict(x, samples=True)")
        return self.samples

    def normals(self) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of each draw's normal, (samples, batch, ...).

        Raises ValueError if the prediction holds no samples.
        """
        mean, log_variance = self._components().unbind(-1)
        return mean, (0.5 * log_variance).exp()


def as_columns(y: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The targets in this shape, (batch,) becoming (batch, 1) for one output. Raises ValueError for another shape."""
    if y.ndim == 1 and len(shape) == 2 and shape[-1] == 1:
        y = y.unsqueeze(-1)
    if tuple(y.shape) != tuple(shape):
        raise ValueError(f"targets {tuple(y.shape)} do not fit outputs {tuple(shape)}: give one target for each")
    return y


def check_regression_targets(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The targets as floating-point numbers of this shape, (batch, ...).

    Raises ValueError for targets that are not finite real numbers or have another shape.
    """
    if y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"regression targets must be real numbers, got {y.dtype}")
    y = as_columns(y if y.is_floating_point() else y.to(torch.float32), shape)
    check_labeled(y)
    if not bool(y.isfinite().all()):
        row = int((~y.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"target of row {row} is not finite; remove or impute such rows")
    return y


def columns(outputs: Tensor) -> Tensor:
    """The outputs with at least two axes: (batch,) becomes (batch, 1)."""
    return outputs.unsqueeze(-1) if outputs.ndim == 1 else outputs


def normal_nll(parameters: Tensor, y: Tensor) -> Tensor:
    """The negative log density of each output, (...), in nats; leading axes broadcast.

    parameters: (..., 2) mean and log-variance; y: (...).
    """
    mean, log_variance = wide(parameters).unbind(-1)
    return 0.5 * (math.log(2 * math.pi) + log_variance + (y - mean).square() * (-log_variance).exp())


class NormalLikelihood(Likelihood):
    """The base class of Gaussian likelihoods: a subclass maps outputs to means and log-variances in `forward`.

    covariance: whether predictions hold the covariance between outputs, (batch, ..., outputs, outputs).
    channel_axis: the axis of the network's outputs that holds the targets of a row: 1 for images (batch, channels,
        height, width), -1 for the last. It is the last by default, and must be given for more than three axes.
    """

    channel_axis: int | None = None  # for likelihoods pickled before this attribute existed

    def __init__(self, covariance: bool = False, channel_axis: int | None = None):
        super().__init__()
        if channel_axis == 0:
            raise ValueError(
                "channel_axis must not be 0, which is the batch: give 1 for images (batch, channels, height, width)"
            )
        self.covariance, self.channel_axis = covariance, channel_axis

    def extra_repr(self) -> str:
        return "" if self.channel_axis is None else f"channel_axis={self.channel_axis}"

    def output_axis(self, axes: int) -> int:
        """The axis that holds the targets of a row, counted from the end, in network outputs with this many axes.

        axes: includes the batch. Raises ValueError for more than three axes without channel_axis: with the last as
        default, each column of an image would get its own noise level.
        """
        name = type(self).__name__
        if self.channel_axis is None:
            if axes > 3:
                raise ValueError(
                    f"the module returned {axes} axes, so vbdl cannot tell which one holds the outputs: name the axis, "
                    f"vbdl.{name}(channel_axis=1) for images (batch, channels, height, width), channel_axis=-1 for the "
                    f"last axis"
                )
            return -1
        if not 1 - axes <= self.channel_axis < axes:
            raise ValueError(
                f"{name}(channel_axis={self.channel_axis}) does not fit the module, which returned {axes} axes: name "
                f"one of them"
            )
        return self.channel_axis if self.channel_axis < 0 else self.channel_axis - axes

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return check_regression_targets(y, tuple(parameters_shape[:-1]))

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The negative log-likelihood, (batch,), in nats, summed over a row's elements.

        parameters: (batch, ..., 2) mean and log-variance; y: (batch, ...).
        """
        return per_row(normal_nll(parameters, y))

    def summarize(self, parameters: Tensor) -> State:
        """The statistics of these samples; parameters: (samples, batch, ..., 2) mean and log-variance."""
        mean, log_variance = wide(parameters).unbind(-1)
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
        epistemic = summary["deviation"] / n  # / n, not n - 1: the variance of the mixture of these n samples
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

    def prediction(self, fields: State, n_samples: int | Tensor, samples: Tensor | None = None) -> RegressionPrediction:
        axis = self._axis(fields["mean"].ndim)
        return RegressionPrediction(**fields, n_samples=n_samples, samples=samples, output_axis=axis)

    def _axis(self, axes: int) -> int:
        """The axis that holds the targets of a row, counted from the end; the last unless channel_axis is set."""
        return -1 if self.channel_axis is None else self.output_axis(axes)

    def _outputs_last(self, values: Tensor, axes: int) -> Tensor:
        """The values with the outputs axis moved last; axes: the number of axes without samples."""
        axis = self._axis(axes)
        return values if axis == -1 else values.movedim(axis, -1)
