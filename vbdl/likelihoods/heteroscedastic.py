"""Real targets whose noise level the network predicts for each row."""

import math

import torch
from torch import Tensor

from vbdl.likelihoods.moments import per_row
from vbdl.likelihoods.normal_mixture import LOG_VARIANCE_BOUND, NormalLikelihood, normal_nll
from vbdl.types import DiagonalHessian


class HeteroscedasticGaussian(NormalLikelihood):
    """The likelihood y ~ N(mean, variance) whose outputs, (batch, ..., 2 * outputs), are means, then log-variances.

    Nix and Weigend, Estimating the Mean and Variance of the Target Probability Distribution, 1994.
    beta: training weighs each term by variance^beta, held constant, so that rows with a bad fit early in training are
        not explained as noise (Seitzer et al., On the Pitfalls of Heteroscedastic Uncertainty Estimation, ICLR 2022,
        https://arxiv.org/abs/2203.09168); 0 is the plain likelihood, 0.5 the paper's choice.
    covariance: whether predictions hold the covariance between outputs, (batch, ..., outputs, outputs).
    unit: the unit of the std in the weights variance^beta. Set to the targets' standard deviation, it makes steps,
        clipped gradients and the balance with a KL term independent of the unit of the targets.
    channel_axis: the axis of means and log-variances if it is not the last: 1 for images (batch, 2 * outputs, height,
        width). It must be given for more than three axes.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))  # a mean and a log-variance
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 3), vbdl.HeteroscedasticGaussian(), compile=False)
    >>> p = predict(torch.randn(5, 4), samples=True)
    >>> low, high = p.interval(0.9)
    >>> low.shape, bool((low < high).all())
    (torch.Size([5, 1]), True)
    """

    def __init__(
        self,
        beta: float = 0.0,
        covariance: bool = False,
        unit: float | None = None,
        channel_axis: int | None = None,
    ):
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must lie between 0 (likelihood) and 1 (squared error), got {beta}")
        if unit is not None and not (unit > 0 and math.isfinite(unit)):
            raise ValueError(f"unit must be positive and finite, got {unit}")
        super().__init__(covariance, channel_axis)
        self.beta, self.unit = beta, unit

    def extra_repr(self) -> str:
        settings = f"beta={self.beta}" + ("" if self.unit is None else f", unit={self.unit:g}")
        return ", ".join(part for part in (settings, super().extra_repr()) if part)

    def forward(self, outputs: Tensor) -> Tensor:
        """The mean and log-variance of each output, (batch, ..., outputs, 2); outputs: (batch, ..., 2 * outputs)."""
        if outputs.ndim < 2 or outputs.shape[axis := self.output_axis(outputs.ndim)] % 2:
            raise ValueError(
                f"HeteroscedasticGaussian needs (batch, 2 * outputs): means, then log-variances; "
                f"the module returned {tuple(outputs.shape)}"
            )
        mean, log_variance = outputs.chunk(2, dim=axis)
        return torch.stack((mean, log_variance.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)), dim=-1)

    def hessian(self, outputs: Tensor, y: Tensor) -> DiagonalHessian:
        """The Fisher information of means and log-variances, 1 / variance and 1 / 2: the Hessian's mean over y.

        The Hessian at one y is never positive unless y is the mean.
        """
        axis = self.output_axis(outputs.ndim)
        _, free = outputs.chunk(2, dim=axis)
        log_variance = free.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)
        of_log_variance = torch.where(free == log_variance, 0.5, 0.0).to(outputs.dtype)  # beyond the bound it is fixed
        return DiagonalHessian(torch.cat([(-log_variance).exp(), of_log_variance], dim=axis).flatten(1))

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The negative log-likelihood, (batch,), in nats, with each output's term weighed by variance^beta."""
        if self.beta == 0.0:
            return self.nll(parameters, y)
        log_variance = parameters[..., 1].detach() - 2 * math.log(self.unit or 1.0)
        weight = (self.beta * log_variance).exp()
        return per_row(weight * normal_nll(parameters, y))
