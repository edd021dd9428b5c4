"""Out-of-distribution scores from predictive distributions: one number per row, high for unfamiliar rows.

Hendrycks, Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution Examples, 2017,
https://arxiv.org/abs/1610.02136 (maximum softmax probability)
Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, 2022, https://arxiv.org/abs/1911.11132
(maximum logit)
Liu, Wang, Owens, Li, Energy-based Out-of-distribution Detection, 2020, https://arxiv.org/abs/2010.03759
Depeweg et al., Decomposition of Uncertainty in Bayesian Deep Learning, 2018, https://arxiv.org/abs/1710.07283 (mutual
information, expected entropy)
Freeman, Elementary Applied Statistics, 1965 (variation ratio)

A score takes the mean probabilities (batch, classes), the samples' logits or probabilities (samples, batch, classes),
or the samples' means of a regression. Logits or probabilities (batch, classes) count as one sample. Entropies are in
nats.
"""

import torch
from torch import Tensor
from torch.special import xlogy

from vbdl.metrics._checks import check_finite, check_probs


def _samples(values: Tensor, name: str) -> Tensor:
    values = check_finite(values, name)
    if values.ndim == 2:
        values = values.unsqueeze(0)
    if values.ndim != 3 or values.shape[0] == 0 or values.shape[2] == 0:
        raise ValueError(f"{name} must be (samples, batch, classes), not {tuple(values.shape)}")
    return values


def _sample_probs(probs: Tensor) -> Tensor:
    values = _samples(probs, "probs")
    check_probs(values.reshape(-1, values.shape[2]), empty=True)
    return values


def msp(probs: Tensor) -> Tensor:
    """1 minus the largest mean probability: (batch, classes), or (batch,) of class 1 -> (batch,)

    >>> vbdl.ood.msp(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    return 1 - check_probs(probs, empty=True).amax(dim=1)


def max_logit(logits: Tensor) -> Tensor:
    """The negative largest logit, averaged over samples: (samples, batch, classes) -> (batch,)

    >>> logits = torch.tensor([[[5.0, 0.0], [0.1, 0.0]]])  # (samples, rows, classes)
    >>> vbdl.ood.max_logit(logits).round(decimals=2)
    tensor([-5.0000, -0.1000], dtype=torch.float64)
    """
    return -_samples(logits, "logits").amax(dim=2).mean(dim=0)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The energy -T log Σ exp(z / T), averaged over samples: (samples, batch, classes) -> (batch,)

    >>> logits = torch.tensor([[[5.0, 0.0], [0.1, 0.0]]])  # (samples, rows, classes)
    >>> vbdl.ood.energy(logits).round(decimals=2)  # higher: stranger
    tensor([-5.0100, -0.7400], dtype=torch.float64)
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    logits = _samples(logits, "logits")
    return -temperature * (logits / temperature).logsumexp(dim=2).mean(dim=0)


def entropy(probs: Tensor) -> Tensor:
    """The entropy of the mean probabilities, nats: (batch, classes), or (batch,) of class 1 -> (batch,)

    >>> vbdl.ood.entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).round(decimals=3)
    tensor([0.6930, 0.0000], dtype=torch.float64)
    """
    p = check_probs(probs, empty=True)
    return 0.0 - xlogy(p, p).sum(dim=1)


def expected_entropy(probs: Tensor) -> Tensor:
    """The samples' mean entropy (aleatoric), nats: (samples, batch, classes) -> (batch,)

    >>> probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])  # (samples, rows, classes)
    >>> vbdl.ood.expected_entropy(probs).round(decimals=3)
    tensor([0.6930, 0.0000], dtype=torch.float64)
    """
    p = _sample_probs(probs)
    return (0.0 - xlogy(p, p).sum(dim=2)).mean(dim=0)


def mutual_information(probs: Tensor) -> Tensor:
    """The entropy of the mean minus the mean entropy (epistemic), nats: (samples, batch, classes) -> (batch,)

    >>> probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])  # (samples, rows, classes)
    >>> vbdl.ood.mutual_information(probs).round(decimals=3)
    tensor([0.0000, 0.6930], dtype=torch.float64)
    """
    p = _sample_probs(probs)
    mean = p.mean(dim=0)
    # computed as the mean KL divergence to the mean, which has no cancellation and is negative only by rounding
    divergence = (xlogy(p, p) - xlogy(p, mean)).sum(dim=2)
    return divergence.mean(dim=0).clamp(min=0)


def variance(probs: Tensor) -> Tensor:
    """The variance of the probabilities over samples, summed over classes: (samples, batch, classes) -> (batch,)

    >>> probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])  # (samples, rows, classes)
    >>> vbdl.ood.variance(probs).round(decimals=3)
    tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    return _sample_probs(probs).var(dim=0, correction=0).sum(dim=1)


def variation_ratio(probs: Tensor) -> Tensor:
    """The share of samples that do not vote for the class with most votes: (samples, batch, classes) -> (batch,)

    >>> probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])  # (samples, rows, classes)
    >>> vbdl.ood.variation_ratio(probs).round(decimals=3)
    tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    p = _sample_probs(probs)
    votes = torch.nn.functional.one_hot(p.argmax(dim=2), p.shape[2]).sum(dim=0)
    return 1 - votes.amax(dim=1).to(torch.float64) / p.shape[0]


def epistemic_variance(means: Tensor) -> Tensor:
    """The variance of the predicted means over samples, summed over outputs, which should have a common scale.

    (samples, batch) or (samples, batch, ...) -> (batch,)

    >>> means = torch.tensor([[0.0, 1.0], [0.0, 3.0]])  # (samples, rows)
    >>> vbdl.ood.epistemic_variance(means)
    tensor([0., 1.], dtype=torch.float64)
    """
    means = check_finite(means, "means")
    if means.ndim < 2 or means.shape[0] == 0:
        raise ValueError(f"means must be (samples, batch) or (samples, batch, ...), not {tuple(means.shape)}")
    spread = means.var(dim=0, correction=0)
    return spread if spread.ndim == 1 else spread.flatten(1).sum(dim=1)
