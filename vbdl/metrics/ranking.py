"""Metrics of how well a score separates positives from negatives: AUROC, AUPR, FPR at a TPR. Positives score high.

They need all rows at once: for a stream use Rows(auroc). Ties count half (AUROC) or are accepted together (AUPR, FPR),
so that the order of rows does not matter. Raises ValueError if a class is missing or a score is NaN.

Hanley, McNeil, The meaning and use of the area under a ROC curve, 1982, https://doi.org/10.1148/radiology.143.1.7063747
DeLong, DeLong, Clarke-Pearson, Comparing the areas under two or more correlated ROC curves, 1988,
https://doi.org/10.2307/2531595 (interval)
"""

import math

import torch
from scipy import stats
from torch import Tensor

from vbdl.metrics._checks import check_labels, check_rate, check_scores
from vbdl.metrics._counts import at_least
from vbdl.metrics.estimate import Interval


def _check(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    scores = check_scores(scores)
    labels = check_labels(positive, scores.numel(), 2, "positive").to(scores.device) == 1
    n_positive = int(labels.sum())
    if n_positive in (0, scores.numel()):
        missing = "positive" if n_positive == 0 else "negative"
        raise ValueError(f"no {missing} rows: a ranking metric needs both classes")
    return scores, labels


def _mid_ranks(values: Tensor) -> Tensor:
    """The ranks 1..n of the values; equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts - 1) / 2)[inverse]


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The AUROC: P(score of a positive > score of a negative) + ½P(equal); exactly 0.5 for constant scores.

    scores: (batch,);  positive: (batch,) bool or 0/1

    >>> scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    >>> vbdl.metrics.auroc(scores, positive)
    0.75
    """
    scores, labels = _check(scores, positive)
    n1 = int(labels.sum())
    n0 = labels.numel() - n1
    return (float(_mid_ranks(scores)[labels].sum()) - n1 * (n1 + 1) / 2) / (n1 * n0)


def auroc_interval(scores: Tensor, positive: Tensor, level: float = 0.95) -> Interval:
    """The AUROC with DeLong's interval on the logit scale, which stays inside [0, 1]; needs two rows of each class.

    At an AUROC of exactly 0 or 1 DeLong's variance is 0 although the true value is uncertain. The inner bound is then
    (1 - level)^(1/n) away from the other end of [0, 1], with n = min(n1, n0) (rule of three).

    >>> scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    >>> found = vbdl.metrics.auroc_interval(scores, positive)
    >>> 0 < found.lower < found.value < found.upper < 1
    True
    """
    check_rate(level, "level")
    scores, labels = _check(scores, positive)
    a, b = scores[labels], scores[~labels]
    n1, n0 = a.numel(), b.numel()
    if min(n1, n0) < 2:
        raise ValueError(f"an interval needs two rows of each class, there are {n1} positive and {n0} negative")
    ranks = _mid_ranks(scores)
    area = (float(ranks[labels].sum()) - n1 * (n1 + 1) / 2) / (n1 * n0)
    placements_a = (ranks[labels] - _mid_ranks(a)) / n0
    placements_b = 1 - (ranks[~labels] - _mid_ranks(b)) / n1
    variance = float(placements_a.var()) / n1 + float(placements_b.var()) / n0
    if area in (0.0, 1.0):
        far = (1 - level) ** (1 / min(n1, n0))
        return Interval(area, far, 1.0, level) if area == 1.0 else Interval(area, 0.0, 1 - far, level)
    logit, scale = math.log(area / (1 - area)), math.sqrt(variance) / (area * (1 - area))
    half = float(stats.norm.ppf(0.5 + level / 2)) * scale
    lower, upper = (1 / (1 + math.exp(-(logit + side))) for side in (-half, half))
    return Interval(area, lower, upper, level)


def _cumulative(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(true positives, false positives) at each distinct threshold, the highest first; float64 counts."""
    values, inverse = scores.unique(return_inverse=True)
    zeros = torch.zeros(values.numel(), dtype=torch.int64, device=scores.device)
    positives = zeros.index_add(0, inverse, labels.to(torch.int64))
    negatives = zeros.index_add(0, inverse, (~labels).to(torch.int64))
    # float64 counts: int64 / int64 is float32 in torch
    return positives.flip(0).cumsum(0).double(), negatives.flip(0).cumsum(0).double()


def aupr(scores: Tensor, positive: Tensor) -> float:
    """The average precision Σ (recall step) · precision, without interpolation (optimistic, Davis, Goadrich, 2006).

    Constant scores give exactly the share of positives.

    >>> scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    >>> round(vbdl.metrics.aupr(scores, positive), 3)
    0.833
    """
    true, false = _cumulative(*_check(scores, positive))
    step = torch.diff(true, prepend=true.new_zeros(1)) / true[-1]
    return float((step * (true / (true + false))).sum())


def fpr_at_tpr(scores: Tensor, positive: Tensor, tpr: float = 0.95) -> float:
    """The lowest false-positive rate among thresholds that accept at least the share `tpr` of positives (FPR95).

    >>> scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    >>> vbdl.metrics.fpr_at_tpr(scores, positive)
    0.5
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], not {tpr}")
    true, false = _cumulative(*_check(scores, positive))
    needed = at_least(tpr, int(true[-1]))
    return float(false[int((true >= needed).nonzero()[0])] / false[-1])
