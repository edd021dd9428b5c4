"""Real targets with one noise level an output, learned with the network or given."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vbdl.likelihoods import normal_mixture
from vbdl.likelihoods.moments import per_row
from vbdl.likelihoods.normal_mixture import LOG_VARIANCE_BOUND, RegressionPrediction
from vbdl.types import State


class Gaussian(nn.Module):
    """y = output + noise, noise ~ N(0, std^2), the same for every row (homoscedastic).

    std: the noise level in target units at the start, or for good with learned=False.
    covariance: predictions carry the covariance between outputs, (batch, outputs, outputs).
    Each member of an ensemble learns a noise level of its own.
    """

    def __init__(self, n_outputs: int = 1, std: float = 1.0, learned: bool = True, covariance: bool = False):
        super().__init__()
        if n_outputs < 1 or not std > 0 or not math.isfinite(std):
            raise ValueError(f"Gaussian needs n_outputs >= 1 and a finite std > 0, got {n_outputs} and {std}")
        self.n_outputs, self.learned, self.covariance = n_outputs, learned, covariance
        log_std = torch.full((n_outputs,), math.log(std))
        if learned:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)

    def extra_repr(self) -> str:
        return f"n_outputs={self.n_outputs}, learned={self.learned}"

    @property
    def noise_std(self) -> Tensor:
        """(outputs,), or (members, outputs) after an ensemble has learned it; target units."""
        return self.log_std.detach().exp()

    def forward(self, outputs: Tensor) -> Tensor:
        """(batch, outputs) -> (batch, outputs, 2) mean and log-variance"""
        mean = normal_mixture.columns(outputs)
        if mean.shape[-1] != self.n_outputs:
            raise ValueError(
                f"Gaussian(n_outputs={self.n_outputs}) got outputs {tuple(outputs.shape)}; "
                f"give it n_outputs={mean.shape[-1]}, or use HeteroscedasticGaussian for two heads"
            )
        log_variance = (2 * self.log_std).clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)
        return torch.stack((mean, log_variance.to(mean.dtype).expand_as(mean)), dim=-1)

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return normal_mixture.check_regression_targets(y, tuple(parameters_shape[:-1]))

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """(batch, outputs, 2), (batch, outputs) -> (batch,) nats"""
        return per_row(normal_mixture.normal_nll(parameters, y))

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.nll(parameters, y)

    def summarize(self, parameters: Tensor) -> State:
        return normal_mixture.summarize(parameters, self.covariance)

    def merge(self, a: State, b: State) -> State:
        return normal_mixture.merge(a, b)

    def finish(self, summary: State) -> State:
        return normal_mixture.finish(summary)

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> RegressionPrediction:
        return RegressionPrediction(**fields, n_samples=n_samples, samples=samples)
