"""Real targets with one noise level an output, learned with the network or given."""

import math

import torch
from torch import Tensor, nn

from vbdl.likelihoods.normal_mixture import LOG_VARIANCE_BOUND, NormalLikelihood, columns


class Gaussian(NormalLikelihood):
    """y = output + noise, noise ~ N(0, std^2), the same for every row (homoscedastic).

    std: the noise level in target units at the start, or for good with learned=False.
    covariance: predictions carry the covariance between outputs, (batch, ..., outputs, outputs).
    channel_axis: the axis of the outputs where it is not the last: 1 for images (batch, channels, height, width), which
        then have one noise level a channel. It must be named for more than three axes.
    Each member of an ensemble learns a noise level of its own.
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
        """(outputs,), or (members, outputs) after an ensemble has learned it; target units."""
        return self.log_std.detach().exp()

    def forward(self, outputs: Tensor) -> Tensor:
        """(batch, ..., outputs), or with the outputs on channel_axis -> the same shape and (..., 2), mean and
        log-variance"""
        mean = columns(outputs)
        axis = self.output_axis(mean.ndim)
        if mean.shape[axis] != self.n_outputs:
            many = "" if mean.ndim < 3 else ", name their axis with channel_axis= where it is not the last"
            raise ValueError(
                f"Gaussian(n_outputs={self.n_outputs}) got outputs {tuple(outputs.shape)}; "
                f"give it n_outputs={mean.shape[axis]}{many}, or use HeteroscedasticGaussian for two heads"
            )
        log_variance = (2 * self.log_std).clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)
        log_variance = log_variance.reshape(-1, *[1] * (-1 - axis))
        return torch.stack((mean, log_variance.to(mean.dtype).expand_as(mean)), dim=-1)
