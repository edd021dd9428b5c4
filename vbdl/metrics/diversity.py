"""Measures of how much the members of an ensemble differ.

Fort, Hu, Lakshminarayanan, Deep Ensembles: A Loss Landscape Perspective, 2019, https://arxiv.org/abs/1912.02757
(disagreement)
Kuncheva, Whitaker, Measures of Diversity in Classifier Ensembles, 2003, https://doi.org/10.1023/A:1022859003006 (Q
statistic, error correlation)
Houlsby, Huszár, Ghahramani, Lengyel, Bayesian Active Learning for Classification and Preference Learning, 2011,
https://arxiv.org/abs/1112.5745 (mutual information)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import xlogy

from vbdl.metrics._checks import check_labels, check_probs


@dataclass(frozen=True)
class Diversity:
    """The diversity of an ensemble's members: averages over rows, and over pairs of members if "pairwise".

    >>> probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])  # (samples, rows, classes)
    >>> found = vbdl.metrics.diversity(probs, torch.tensor([0, 1]))
    >>> round(found.variance, 3)
    0.25
    """

    disagreement: float  # pairwise share of rows with different labels, in [0, 1]
    mutual_information: float  # nats: entropy of the mean minus mean entropy, = mean KL to the mean
    pairwise_kl: float  # nats; infinite if a member gives probability 0 to a class that another allows
    variance: float  # variance of the probabilities over members, summed over classes
    error_correlation: float  # pairwise correlation of errors; NaN without y, or if a member is always right or wrong
    q_statistic: float  # pairwise, in [-1, 1]; NaN without y, or if it is 0/0


def diversity(probs: Tensor, y: Tensor | None = None) -> Diversity:
    """Measure the diversity of an ensemble.

    probs: (members, batch, classes), at least two members.
    y: (batch,) labels, needed for error_correlation and q_statistic.

    >>> probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])  # (samples, rows, classes)
    >>> found = vbdl.metrics.diversity(probs)
    >>> found.disagreement, round(found.mutual_information, 3)
    (0.5, 0.347)
    """
    if not isinstance(probs, Tensor) or probs.ndim != 3:
        shape = tuple(probs.shape) if isinstance(probs, Tensor) else type(probs).__name__
        raise ValueError(f"probs must be a (members, batch, classes) tensor, not {shape}")
    members, batch, classes = probs.shape
    if members < 2:
        raise ValueError(f"diversity needs at least two members, there are {members}")
    p = check_probs(probs.reshape(members * batch, classes)).reshape(members, batch, classes)
    mean = p.mean(dim=0)
    labels = p.argmax(dim=2)
    entropies = -xlogy(p, p).sum(dim=2)
    row, column = torch.triu_indices(members, members, offset=1)
    pairs = list(zip(row.tolist(), column.tolist(), strict=True))
    disagreement = sum(float((labels[i] != labels[j]).double().mean()) for i, j in pairs)
    # both directions of each pair: KL(i‖j) + KL(j‖i)
    kl = sum(
        float((xlogy(p[i], p[i]) - xlogy(p[i], p[j])).sum(dim=1).mean())
        + float((xlogy(p[j], p[j]) - xlogy(p[j], p[i])).sum(dim=1).mean())
        for i, j in pairs
    )
    correlation = q = float("nan")
    if y is not None:
        y = check_labels(y, batch, classes).to(p.device)
        wrong = (labels != y).to(torch.float64)
        if bool((wrong.var(dim=1, correction=0) > 0).all()):
            correlation = float(torch.corrcoef(wrong)[row, column].mean())
        q = sum(_q_statistic(wrong[i], wrong[j]) for i, j in pairs) / len(pairs)
    return Diversity(
        disagreement=disagreement / len(pairs),
        mutual_information=float((-xlogy(mean, mean).sum(dim=1) - entropies.mean(dim=0)).mean()),
        pairwise_kl=kl / (2 * len(pairs)),
        variance=float(p.var(dim=0, correction=0).sum(dim=1).mean()),
        error_correlation=correlation,
        q_statistic=q,
    )


def _q_statistic(a: Tensor, b: Tensor) -> float:
    """Yule's Q of two members' errors, (n11 n00 - n01 n10) / (n11 n00 + n01 n10); a, b: (batch,) 0 or 1."""
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    only_a, only_b = float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
    total = both * neither + only_a * only_b
    return (both * neither - only_a * only_b) / total if total else float("nan")
