"""Std scaling: a factor on the predicted standard deviations, the analogue of a temperature for regressions.

Laves, Ihler, Fast, Kahrs, Ortmaier, Well-Calibrated Regression Uncertainty in Medical Imaging with Deep Learning, 2020,
https://proceedings.mlr.press/v121/laves20a.html
Levi, Gispan, Giladi, Fetaya, Evaluating and Calibrating Uncertainty Prediction in Regression Tasks, 2022,
https://arxiv.org/abs/1905.11659
"""

import math

import torch
from torch import Tensor

from vbdl.calibration._fit import minimize
from vbdl.likelihoods.normal_mixture import RegressionPrediction
from vbdl.metrics._checks import check_std, check_targets
from vbdl.metrics.nll import check_mixture
from vbdl.types import Calibrator, State


class StdScaling(Calibrator):
    """A map std -> scale · std that keeps the mean; scale > 0 minimizes the negative log-likelihood.

    per_output: a scale for each output, or one for all. Outputs are on the last axis, or the likelihood's channel_axis;
        all other axes (time, pixels) share the scales.

    A mixture is stretched about its mean, means_s -> mean + scale (means_s - mean) and stds_s -> scale · stds_s. This
    keeps its shape and multiplies total, aleatoric and epistemic variance by scale², so they still add up.

    >>> _ = torch.manual_seed(0)
    >>> mean = torch.randn(500)
    >>> y = mean + 2 * torch.randn(500)  # the noise is twice as large as predicted
    >>> std = torch.ones(500)
    >>> method = vbdl.StdScaling().fit(mean, std, y)
    >>> round(method.scale.item(), 1)
    2.1
    """

    needs_samples = True
    changes_samples = True
    log_scale: Tensor

    def __init__(self, per_output: bool = True):
        super().__init__()
        self.per_output = per_output
        self.register_buffer(
            "log_scale", torch.zeros((), dtype=torch.float64)
        )  # (), (outputs,), or (outputs, 1, ...) with axes behind

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def fit(self, mean: Tensor, std: Tensor, y: Tensor, output_axis: int = -1) -> "StdScaling":
        """Fit the scale; return self.

        mean, std: of a Gaussian, (batch,) or (batch, ...), with the closed form scale² = mean of z²; or of a mixture,
            (samples, batch) or (samples, batch, ...).
        y: (batch,) or (batch, ...).
        output_axis: the axis of the outputs, counted from the end.
        Raises ValueError without rows, and if every mean equals its target, because the best scale would be 0.
        """
        if y.shape[0] == 0:
            raise ValueError("y has no rows")
        if mean.ndim == y.ndim + 1:
            means, stds, target, log_weights = check_mixture(mean, std, y, None)
            assert target is not None
            center = means.mean(dim=0)
            self.log_scale = self._fit_mixture(means - center, stds, target - center, log_weights, output_axis)
            return self
        mean, y = check_targets(mean, y)
        z2 = ((y - mean) / check_std(std, mean.shape)) ** 2
        mean_z2 = self._averaged(z2, output_axis)
        if bool((mean_z2 == 0).any()):
            raise ValueError("every mean equals its target, so a std of 0 would fit best; use other rows")
        self.log_scale = 0.5 * mean_z2.log()
        return self

    def _averaged(self, each: Tensor, output_axis: int) -> Tensor:
        """The means over values that share a scale: (batch, ...) -> (), (outputs,), or (outputs, 1, ...)."""
        if not self.per_output or each.ndim == 1:
            return each.mean()
        last = each.movedim(output_axis, -1)
        return last.reshape(-1, last.shape[-1]).mean(0).reshape(-1, *[1] * (-1 - output_axis))

    def _fit_mixture(
        self, apart: Tensor, stds: Tensor, residual: Tensor, log_weights: Tensor, output_axis: int
    ) -> Tensor:
        """The log scale for a mixture. apart: the components' means minus the mixture's, (samples, batch, ...)."""
        moment = self._averaged(residual**2 / (stds**2 + apart**2).mean(0), output_axis)
        if bool((moment == 0).any()):
            raise ValueError("every mean equals its target, so a std of 0 would fit best; use other rows")
        start = 0.5 * moment.log()

        def loss(v: Tensor) -> Tensor:
            scale = v.reshape(start.shape).exp()
            z = (residual - scale * apart) / (scale * stds)
            log_density = -0.5 * z**2 - (scale * stds).log() - 0.5 * math.log(2 * math.pi)
            # each output has a separate mixture, so that its scale is fitted independently
            weights = log_weights.reshape(-1, *[1] * (log_density.ndim - 1))
            return -self._averaged((log_density + weights).logsumexp(0), output_axis).sum()

        return minimize(loss, start.reshape(-1)).reshape(start.shape)

    def forward(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Scale a Gaussian: mean, std (batch,) or (batch, ...) -> (mean, scaled std)."""
        return mean, std * self.scale.to(std.dtype)

    def mixture(self, means: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
        """Stretch a mixture: means, stds (samples, batch) or (samples, batch, ...) -> (means, stds)."""
        scale, center = self.scale.to(means.dtype), means.mean(dim=0)
        return center + scale * (means - center), scale * stds

    def variance(self, variance: Tensor) -> Tensor:
        """Scale a variance (total, aleatoric or epistemic), (batch, ...), in squared units of the target."""
        return variance * (2 * self.log_scale).exp().to(variance.dtype)

    def fit_prediction(self, prediction: RegressionPrediction, y: Tensor) -> "StdScaling":
        """Fit to a prediction with samples, mean and log-variance (samples, batch, ..., 2); return self."""
        return self.fit(*prediction.normals(), y, prediction.output_axis)

    def fields(self, fields: State) -> State:
        """The prediction's fields with scaled variances."""
        scaled = {n: self.variance(fields[n]) for n in ("total", "aleatoric", "epistemic")}
        if "covariance" in fields:
            scale = self.scale.to(fields["covariance"].dtype)
            scale = scale.flatten() if scale.ndim else scale  # covariances have the outputs on the last axes
            scaled["covariance"] = fields["covariance"] * (scale.unsqueeze(-1) * scale if scale.ndim else scale**2)
        return {**fields, **scaled}

    def samples(self, samples: Tensor) -> Tensor:
        """The components of the stretched mixture, (samples, batch, ..., 2)."""
        mean, log_variance = samples.unbind(-1)
        center = mean.mean(dim=0)
        scale = self.scale.to(mean.dtype)
        stretched = center + scale * (mean - center)
        return torch.stack((stretched, log_variance + 2 * self.log_scale.to(mean.dtype)), dim=-1)
