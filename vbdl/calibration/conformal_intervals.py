"""Split conformal prediction intervals for regression.

Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, Distribution-Free Predictive Inference For Regression, 2018,
https://arxiv.org/abs/1604.04173 (absolute, and divided by a predicted spread)
Romano, Patterson, Candès, Conformalized Quantile Regression, 2019, https://arxiv.org/abs/1905.03222

The guarantee is P(y in interval) >= 1 - alpha for rows exchangeable with the calibration rows, for each output
separately. With too few rows, (n + 1)(1 - alpha) > n, the interval is infinite.
"""

import math
from typing import Self

import torch
from torch import Tensor

from vbdl.calibration.conformal_quantile import conformal_quantile
from vbdl.metrics._checks import check_finite, check_rate, check_std, check_targets
from vbdl.types import Calibrator, Prediction, State


class _Intervals(Calibrator):
    """The base class of conformal intervals, with a threshold for each output."""

    threshold: Tensor | None

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = check_rate(alpha, "alpha")
        self.register_buffer("threshold", None)  # () or (...), one for each output

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

    def _fit(self, scores: Tensor) -> Self:
        """Set the threshold of each output from its scores, (batch,) or (batch, ...)."""
        columns = scores.unsqueeze(-1).flatten(1)
        quantiles = [conformal_quantile(column, self.alpha) for column in columns.T]
        self.threshold = torch.stack(quantiles).reshape(scores.shape[1:])
        return self

    def _threshold(self, dtype: torch.dtype) -> Tensor:
        if self.threshold is None:
            raise RuntimeError(f"{type(self).__name__} has not been fitted: call fit first")
        return self.threshold.to(dtype)

    def fit(self, *inputs: Tensor) -> Self:
        """Fit to the tensors that `inputs` returns, followed by the targets."""
        raise NotImplementedError

    def inputs(self, mean: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        """The arguments of fit and forward, from the mean and total variance of a prediction."""
        raise NotImplementedError

    def fit_prediction(self, prediction: Prediction, y: Tensor) -> Self:
        return self.fit(*self.inputs(prediction.mean, prediction.total), y)

    def fields(self, fields: State) -> State:
        """The prediction's fields, and `lower` and `upper`, (batch, ...) in units of the target."""
        if "mean" not in fields:
            raise NotImplementedError(
                f"{type(self).__name__} reads the mean of each row, and the likelihood's finish() gives only "
                f"{', '.join(fields)}: let it return a field `mean` too, and make `mean` a field of the prediction"
            )
        lower, upper = self(*self.inputs(fields["mean"], fields["total"]))
        return {**fields, "lower": lower, "upper": upper}


class AbsoluteIntervals(_Intervals):
    """Intervals mean ± q of one width for all rows, from the score |y - mean| in units of the target.

    >>> _ = torch.manual_seed(0)
    >>> mean = torch.randn(500)
    >>> y = mean + 2 * torch.randn(500)  # the noise is twice as large as predicted
    >>> lower, upper = vbdl.calibration.AbsoluteIntervals(alpha=0.1).fit(mean, y)(mean)
    >>> vbdl.metrics.interval_coverage(lower, upper, y) >= 0.9
    True
    """

    def fit(self, mean: Tensor, y: Tensor) -> Self:
        """Fit q; return self. mean, y: (batch,) or (batch, ...)"""
        mean, y = check_targets(mean, y)
        return self._fit((y - mean).abs())

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds (lower, upper), in the shape of mean."""
        half = self._threshold(mean.dtype)
        return mean - half, mean + half

    def inputs(self, mean: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        return (mean,)


class NormalizedIntervals(_Intervals):
    """Intervals mean ± q · std, whose width follows the predicted uncertainty, from the score |y - mean| / std.

    >>> _ = torch.manual_seed(0)
    >>> mean = torch.randn(500)
    >>> y = mean + 2 * torch.randn(500)  # the noise is twice as large as predicted
    >>> std = torch.ones(500)
    >>> lower, upper = vbdl.calibration.NormalizedIntervals(alpha=0.1).fit(mean, std, y)(mean, std)
    >>> vbdl.metrics.interval_coverage(lower, upper, y) >= 0.9
    True
    """

    def fit(self, mean: Tensor, std: Tensor, y: Tensor) -> Self:
        """Fit q; return self. mean, std, y: (batch,) or (batch, ...)"""
        mean, y = check_targets(mean, y)
        return self._fit((y - mean).abs() / check_std(std, mean.shape))

    def forward(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds (lower, upper), in the shape of mean."""
        half = self._threshold(mean.dtype) * std
        return mean - half, mean + half

    def inputs(self, mean: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        return mean, total.sqrt()


class CQR(_Intervals):
    """Predicted quantiles, moved outwards or inwards by q, from the score max(lower - y, y - upper) in target units.

    If moving inwards would make the bounds cross, both become their midpoint. Inside a predictor the quantiles are
    those of the normal distribution with the prediction's mean and total variance.

    >>> _ = torch.manual_seed(0)
    >>> mean = torch.randn(500)
    >>> y = mean + 2 * torch.randn(500)  # the noise is twice as large as predicted
    >>> method = vbdl.calibration.CQR(alpha=0.1).fit(mean - 1.645, mean + 1.645, y)
    >>> lower, upper = method(mean - 1.645, mean + 1.645)
    >>> vbdl.metrics.interval_coverage(lower, upper, y) >= 0.9
    True
    """

    def fit(self, lower: Tensor, upper: Tensor, y: Tensor) -> Self:
        """Fit q. lower, upper: predicted alpha/2 and 1 - alpha/2 quantiles;  y: all (batch,) or (batch, ...)"""
        lower, y = check_targets(lower, y, "lower")
        upper = check_finite(upper, "upper")
        if upper.shape != lower.shape:
            raise ValueError(f"upper is {tuple(upper.shape)} but lower is {tuple(lower.shape)}")
        return self._fit(torch.maximum(lower - y, y - upper))

    def forward(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The calibrated bounds (lower, upper), in the shape of the predicted ones."""
        move = self._threshold(lower.dtype)
        low, high = lower - move, upper + move
        middle = (lower + upper) / 2
        return torch.minimum(low, middle), torch.maximum(high, middle)

    def inputs(self, mean: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        half = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - self.alpha, dtype=torch.float64))) * total.sqrt()
        return mean - half, mean + half
