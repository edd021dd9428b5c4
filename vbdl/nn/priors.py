"""Priors over weights, and the KL divergence of a mean-field posterior from them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normal:
    """The prior w ~ N(0, std^2), independent for each weight.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> q = vbdl.MeanField(net, n_data=100, prior={"": vbdl.Normal(1.0), "2": vbdl.Normal(0.1)})
    >>> vbdl.Predictor(q, vbdl.Categorical(), compile=False)(torch.randn(7, 4)).probs.shape
    torch.Size([7, 3])
    """

    std: float = 1.0

    def __post_init__(self):
        if not (self.std > 0 and math.isfinite(self.std)):
            raise ValueError(f"a prior std must be positive and finite, got {self.std}")

    def constants(self) -> list[float]:
        """The numbers to save with a model: std."""
        return [self.std]


@dataclass(frozen=True)
class ScaleMixture:
    """The prior w ~ pi N(0, wide^2) + (1 - pi) N(0, narrow^2), independent for each weight.

    Blundell et al., Weight Uncertainty in Neural Networks, ICML 2015, https://arxiv.org/abs/1505.05424

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> q = vbdl.MeanField(net, n_data=100, prior=vbdl.ScaleMixture())
    >>> vbdl.Predictor(q, vbdl.Categorical(), compile=False)(torch.randn(7, 4)).probs.shape
    torch.Size([7, 3])
    """

    pi: float = 0.5
    wide: float = 1.0
    narrow: float = 0.0025

    def __post_init__(self):
        if not (0 < self.pi < 1 and 0 < self.narrow <= self.wide and math.isfinite(self.wide)):
            raise ValueError(f"a scale mixture needs 0 < pi < 1 and 0 < narrow <= wide, got {self}")

    def constants(self) -> list[float]:
        """The numbers to save with a model: pi, wide, narrow."""
        return [self.pi, self.wide, self.narrow]


Prior = Normal | ScaleMixture


def kl_normal(mean: Tensor, log_std: Tensor, prior: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, prior^2)) in nats, summed over the weights; prior: (1,) std of the prior."""
    log_ratio = 2 * (log_std - prior.log())
    return 0.5 * (log_ratio.exp() + (mean / prior).square() - 1 - log_ratio).sum()


def kl_scale_mixture(weight: Tensor, mean: Tensor, log_std: Tensor, prior: Tensor) -> Tensor:
    """The one-sample estimate of KL(q || mixture) at weight ~ q, in nats, summed; prior: (3,) pi, wide, narrow."""
    pi, wide, narrow = prior.unbind()
    log_q = -log_std - 0.5 * ((weight - mean) * (-log_std).exp()).square()
    one = pi.log() - wide.log() - 0.5 * (weight / wide).square()
    other = (1 - pi).log() - narrow.log() - 0.5 * (weight / narrow).square()
    return (log_q - torch.logaddexp(one, other)).sum()
