"""Real targets with one noise level per output, learned with the network or fixed."""

import math

import torch
from torch import Tensor, nn

from vbdl.likelihoods.normal_mixture import LOG_VARIANCE_BOUND, NormalLikelihood, as_columns, columns
from vbdl.types import DiagonalHessian


class Gaussian(NormalLikelihood):
    """The likelihood y = output + noise with noise ~ N(0, std^2), the same for every row (homoscedastic).

    n_outputs: number of targets of a row, each with its own noise level.
    std: noise level in target units before training, or throughout with learned=False.
    covariance: whether predictions hold the covariance between outputs, (batch, ..., outputs, outputs).
    channel_axis: the axis of the outputs if it is not the last: 1 for images (batch, channels, height, width), which
        then have one noise level per channel. It must be given for more than three axes.
    Each member of an ensemble learns its own noise level.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> likelihood = vbdl.Gaussian(n_outputs=2, std=0.5)
    >>> p = vbdl.Predictor(vbdl.DeepEnsemble(net, 3), likelihood, compile=False)(torch.randn(5, 4))
    >>> p.mean.shape, p.std.shape
    (torch.Size([5, 2]), torch.Size([5, 2]))
    >>> p.aleatoric[0]  # 0.5 squared, in squared units of the target
    tensor([0.2500, 0.2500])
    """

    def __init__(
        self,
        n_outputs: int = 1,
        std: float = 1.0,
        learned: bool = True,
        covariance: bool = False,
        channel_axis: int | None = None,
    ):
        super().__init__(covariance, channel_axis)
        if n_outputs < 1 or not std > 0 or not math.isfinite(std):
            raise ValueError(f"Gaussian needs n_outputs >= 1 and a finite std > 0, got {n_outputs} and {std}")
        self.n_outputs, self.learned = n_outputs, learned
        log_std = torch.full((n_outputs,), math.log(std))
        if learned:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)

    def extra_repr(self) -> str:
        return ", ".join(
            part for part in (f"n_outputs={self.n_outputs}, learned={self.learned}", super().extra_repr()) if part
        )

    @property
    def noise_std(self) -> Tensor:
        """The noise std in target units, (outputs,), or (members, outputs) after an ensemble learned it."""
        return self.log_std.detach().exp()

    def forward(self, outputs: Tensor) -> Tensor:
        """The mean and log-variance of each output: a last axis of 2 added to the shape of `outputs`."""
        mean = columns(outputs)
        axis = self.output_axis(mean.ndim)
        if mean.shape[axis] != self.n_outputs:
            hint = "" if mean.ndim < 3 else ", name their axis with channel_axis= if it is not the last"
            raise ValueError(
                f"Gaussian(n_outputs={self.n_outputs}) got outputs {tuple(outputs.shape)}; "
                f"give it n_outputs={mean.shape[axis]}{hint}, or use HeteroscedasticGaussian for two heads"
            )
        log_variance = (2 * self.log_std).clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)
        log_variance = log_variance.reshape(-1, *[1] * (-1 - axis))
        return torch.stack((mean, log_variance.to(mean.dtype).expand_as(mean)), dim=-1)

    def hessian(self, outputs: Tensor, y: Tensor) -> DiagonalHessian:
        """1 / std^2 of each output, which depends on neither the output nor y."""
        _, log_variance = self(outputs).unbind(-1)
        return DiagonalHessian((-log_variance).exp().flatten(1))

    @property
    def learned_noise(self) -> int:
        return self.n_outputs if self.learned else 0

    def squared_residuals(self, parameters: Tensor, y: Tensor) -> Tensor:
        """((y - mean) / std)^2, (batch, outputs), summed over the axes of an output."""
        mean, log_variance = parameters.unbind(-1)
        y = as_columns(y, mean.shape).to(mean.dtype)
        each = (y - mean).square() * (-log_variance).exp()
        return each.movedim(self.output_axis(mean.ndim), -1).flatten(1, -2).sum(1) if each.ndim > 2 else each

    @torch.no_grad()
    def scale_noise(self, factors: Tensor) -> None:
        self.log_std.add_(factors.log().to(self.log_std))
