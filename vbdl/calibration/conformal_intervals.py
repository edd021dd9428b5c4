"""Split conformal prediction intervals for regression.

Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, Distribution-Free Predictive Inference For Regression,
2018,
https://arxiv.org/abs/1604.04173 (absolute, and divided by a predicted spread)
Romano, Patterson, Candès, Conformalized Quantile Regression, 2019, https://arxiv.org/abs/1905.03222

P(y in interval) >= 1 - alpha for rows exchangeable with the calibration rows, output by output.
With too
few rows, (n + 1)(1 - alpha) > n, the interval is infinite.
"""

import math

import torch
from torch import Tensor, nn

from vbdl.calibration.conformal_quantile import conformal_quantile
from vbdl.metrics._checks import check_finite, check_rate, check_std, check_targets


def _per_output(scores: Tensor, alpha: float) -> Tensor:
    """Quantile of each output's scores: (batch,) -> (), (batch, outputs) -> (outputs,)"""
    if scores.ndim == 1:
        return conformal_quantile(scores, alpha)
    return torch.stack([conformal_quantile(column, alpha) for column in scores.T])


class AbsoluteIntervals(nn.Module):
    """mean ± q, one width for all rows: score |y - mean|, target units."""

    acts_on = "prediction"
    threshold: Tensor | None

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = check_rate(alpha, "alpha")
        self.register_buffer("threshold", None)  # () or (outputs,)

    def fit(self, mean: Tensor, y: Tensor) -> "AbsoluteIntervals":
        """mean, y: (batch,) or (batch, outputs)"""
        mean, y = check_targets(mean, y)
        self.threshold = _per_output((y - mean).abs(), self.alpha)
        return self

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """-> lower, upper, the shape of mean"""
        if self.threshold is None:
            raise RuntimeError("AbsoluteIntervals has not been fitted: call fit first")
        half = self.threshold.to(mean.dtype)
        return mean - half, mean + half

    def fit_prediction(self, prediction, y: Tensor) -> "AbsoluteIntervals":
        return self.fit(prediction.mean, y)

    def fields(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prediction's fields, and `lower` and `upper`, (batch, outputs) in target units."""
        lower, upper = self(fields["mean"])
        return {**fields, "lower": lower, "upper": upper}


class NormalisedIntervals(nn.Module):
    """mean ± q · std, as wide as the predictive says a row is uncertain: score |y - mean| / std."""

    acts_on = "prediction"
    threshold: Tensor | None

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = check_rate(alpha, "alpha")
        self.register_buffer("threshold", None)  # () or (outputs,)

    def fit(self, mean: Tensor, std: Tensor, y: Tensor) -> "NormalisedIntervals":
        """mean, std, y: (batch,) or (batch, outputs)"""
        mean, y = check_targets(mean, y)
        std = check_std(std, mean.shape)
        self.threshold = _per_output((y - mean).abs() / std, self.alpha)
        return self

    def forward(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """-> lower, upper, the shape of mean"""
        if self.threshold is None:
            raise RuntimeError("NormalisedIntervals has not been fitted: call fit first")
        half = self.threshold.to(mean.dtype) * std
        return mean - half, mean + half

    def fit_prediction(self, prediction, y: Tensor) -> "NormalisedIntervals":
        return self.fit(prediction.mean, prediction.total.sqrt(), y)

    def fields(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prediction's fields, and `lower` and `upper`, (batch, outputs) in target units."""
        lower, upper = self(fields["mean"], fields["total"].sqrt())
        return {**fields, "lower": lower, "upper": upper}


class CQR(nn.Module):
    """Predicted quantiles moved outwards, or inwards, by q: score max(lower - y, y - upper), target
    units.

    Where moving inwards would cross the bounds both become their midpoint.
    """

    acts_on = "prediction"
    threshold: Tensor | None

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = check_rate(alpha, "alpha")
        self.register_buffer("threshold", None)  # () or (outputs,)

    def fit(self, lower: Tensor, upper: Tensor, y: Tensor) -> "CQR":
        """lower, upper: predicted alpha/2 and 1 - alpha/2 quantiles;  y: all (batch,) or (batch,
        outputs)"""
        lower, y = check_targets(lower, y, "lower")
        upper = check_finite(upper, "upper")
        if upper.shape != lower.shape:
            raise ValueError(f"upper is {tuple(upper.shape)} but lower is {tuple(lower.shape)}")
        self.threshold = _per_output(torch.maximum(lower - y, y - upper), self.alpha)
        return self

    def forward(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """-> lower, upper, the shape of lower"""
        if self.threshold is None:
            raise RuntimeError("CQR has not been fitted: call fit first")
        move = self.threshold.to(lower.dtype)
        low, high = lower - move, upper + move
        middle = (lower + upper) / 2
        return torch.minimum(low, middle), torch.maximum(high, middle)

    def _quantiles(self, mean: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Of the normal with the predictive's mean and variance: a first guess, which CQR corrects."""
        half = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - self.alpha, dtype=torch.float64)))
        return mean - half * total.sqrt(), mean + half * total.sqrt()

    def fit_prediction(self, prediction, y: Tensor) -> "CQR":
        return self.fit(*self._quantiles(prediction.mean, prediction.total), y)

    def fields(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prediction's fields, and `lower` and `upper`, (batch, outputs) in target units."""
        lower, upper = self(*self._quantiles(fields["mean"], fields["total"]))
        return {**fields, "lower": lower, "upper": upper}
