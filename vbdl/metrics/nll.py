"""The negative log-likelihood of a predictive distribution, in nats per row; densities depend on the target's units.

Good, Rational Decisions, 1952, https://doi.org/10.1111/j.2517-6161.1952.tb00104.x
"""

import math

import torch
from torch import Tensor

from vbdl.metrics._checks import check_finite, check_probs_and_labels, check_std, check_targets

_LOG_2PI = math.log(2 * math.pi)


def categorical_nll(probs: Tensor, y: Tensor) -> Tensor:
    """-log p(y) of each row, in nats.

    probs: (batch, classes), or (batch,) of class 1;  y: (batch,)  ->  (batch,)

    Nothing is clipped: a true class with probability exactly 0 scores infinity. Raises ValueError for NaN and for rows
    that do not sum to one.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> vbdl.metrics.categorical_nll(probs, y).round(decimals=3)
    tensor([0.1050, 1.6090, 0.5110], dtype=torch.float64)
    """
    probs, y = check_probs_and_labels(probs, y, empty=True)
    return -probs.gather(1, y[:, None]).squeeze(1).log()


def gaussian_nll(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """-log N(y; mean, std²) of each row, in nats, summed over the row's outputs.

    mean, std, y: (batch,) or (batch, ...)  ->  (batch,).  Raises ValueError if a std is not positive.

    >>> vbdl.metrics.gaussian_nll(torch.zeros(1), torch.ones(1), torch.zeros(1)).round(decimals=3)
    tensor([0.9190], dtype=torch.float64)
    """
    mean, y = check_targets(mean, y)
    std = check_std(std, mean.shape)
    nll = 0.5 * ((y - mean) / std) ** 2 + std.log() + 0.5 * _LOG_2PI
    return nll.reshape(nll.shape[0], -1).sum(dim=1)


def check_mixture(
    means: Tensor, stds: Tensor, y: Tensor | None, weights: Tensor | None, zero: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Check a Gaussian mixture over the leading samples axis; return (means, stds, y, log weights) as float64."""
    means = check_finite(means, "means")
    if means.ndim < 2 or means.shape[0] == 0:
        raise ValueError(f"means must be (samples, batch) or (samples, batch, ...), not {tuple(means.shape)}")
    stds = check_std(stds, means.shape, "stds", zero=zero)
    if y is not None:
        y = check_finite(y, "y").to(means.device)
        if y.shape != means.shape[1:]:
            raise ValueError(f"y is {tuple(y.shape)} but means is {tuple(means.shape)}: y must be means.shape[1:]")
    if weights is None:
        log_weights = means.new_full((means.shape[0],), -math.log(means.shape[0]))
    else:
        weights = check_finite(weights, "weights").to(means.device)
        if weights.shape != means.shape[:1] or bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-6:
            raise ValueError("weights must be (samples,), not negative and sum to one")
        log_weights = weights.log()
    return means, stds, y, log_weights


def mixture_nll(means: Tensor, stds: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """-log Σ_s w_s Π_d N(y_d; mean_sd, std_sd²) of each row, in nats: the joint density of the row's outputs.

    means, stds: (samples, batch) or (samples, batch, ...);  y: (batch,) or (batch, ...)  -> (batch,)
    weights: (samples,), equal by default.

    This mixture is the predictive distribution of an ensemble; the Gaussian with its mean and variance is not.

    >>> means = torch.tensor([[-1.0], [1.0]])  # (samples, rows)
    >>> vbdl.metrics.mixture_nll(means, torch.ones(2, 1), torch.zeros(1)).round(decimals=3)
    tensor([1.4190], dtype=torch.float64)
    """
    means, stds, target, log_weights = check_mixture(means, stds, y, weights)
    assert target is not None
    log_density = -0.5 * ((target - means) / stds) ** 2 - stds.log() - 0.5 * _LOG_2PI
    log_density = log_density.reshape(*log_density.shape[:2], -1).sum(dim=2)  # (samples, batch)
    return -torch.logsumexp(log_density + log_weights[:, None], dim=0)
