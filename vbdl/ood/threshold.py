"""Thresholds on a score for a target rate, with a bound on that rate for new rows.

Wilks, Determination of Sample Sizes for Setting Tolerance Limits, 1941, https://doi.org/10.1214/aoms/1177731788 (order
statistics as tolerance limits)
"""

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from vbdl.metrics._checks import check_rate, check_scores


@dataclass(frozen=True)
class Threshold:
    """A threshold on a score: rows that score above `value` are flagged.

    >>> threshold = vbdl.ood.threshold_at_fpr(torch.arange(1000.0), fpr=0.05)
    >>> threshold.flag(torch.tensor([10.0, 999.0]))
    tensor([False,  True])
    """

    value: float
    flagged: float  # share of the rows it was chosen on that are flagged
    bound: float  # bound on that share for new rows of the same distribution, holds with probability `confidence`
    confidence: float

    def flag(self, scores: Tensor) -> Tensor:
        """Whether each row is flagged: (batch,) -> (batch,) bool. NaN is flagged."""
        return ~(scores.to(torch.float64) <= self.value)


def threshold_at_fpr(scores: Tensor, fpr: float, confidence: float = 0.95) -> Threshold:
    """The lowest threshold that, with probability `confidence`, flags at most the share `fpr` of new familiar rows.

    scores: (n,) of familiar (in-distribution) rows. The threshold is an order statistic and assumes only that new rows
    have the same distribution. It is +inf, which flags nothing, if n < log(1 - confidence) / log(1 - fpr).

    >>> threshold = vbdl.ood.threshold_at_fpr(torch.arange(1000.0), fpr=0.05)  # scores of familiar rows
    >>> threshold.value, threshold.bound <= 0.05
    (961.0, True)
    """
    check_rate(fpr, "fpr")
    check_rate(confidence, "confidence")
    ordered = check_scores(scores).sort().values
    n = ordered.numel()
    # the share of new rows above the k-th smallest value is Beta(n - k + 1, k) distributed, or smaller if there are
    # ties; it exceeds fpr with probability P(Binomial(n, fpr) <= n - k)
    above = int(stats.binom.ppf(1 - confidence, n, fpr)) - 1
    while above + 1 <= n and stats.binom.cdf(above + 1, n, fpr) <= 1 - confidence:
        above += 1
    while above >= 0 and stats.binom.cdf(above, n, fpr) > 1 - confidence:
        above -= 1
    if above < 0:
        return Threshold(math.inf, 0.0, 0.0, confidence)
    value = ordered[n - 1 - above]
    flagged = int((ordered > value).sum())
    bound = float(stats.beta.ppf(confidence, above + 1, n - above))
    return Threshold(float(value), flagged / n, bound, confidence)


def threshold_at_tpr(scores: Tensor, tpr: float, confidence: float = 0.95) -> Threshold:
    """The highest threshold that, with probability `confidence`, flags at least the share `tpr` of unfamiliar rows.

    scores: (n,) of unfamiliar (out-of-distribution) rows. The threshold is -inf, which flags everything, if n is too
    small. Its `bound` is a lower bound on the flagged share.

    >>> threshold = vbdl.ood.threshold_at_tpr(torch.arange(1000.0), tpr=0.95)  # scores of unfamiliar rows
    >>> round(threshold.value, 1), threshold.bound >= 0.95
    (38.0, True)
    """
    mirrored = threshold_at_fpr(-check_scores(scores), 1 - tpr, confidence)
    if mirrored.value == math.inf:
        return Threshold(-math.inf, 1.0, 1.0, confidence)
    # flag scores equal to the order statistic, too: take the next float below it
    value = math.nextafter(-mirrored.value, -math.inf)
    flagged = float((check_scores(scores) > value).double().mean())
    return Threshold(value, flagged, 1 - mirrored.bound, confidence)
