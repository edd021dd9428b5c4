"""A threshold on a score at a target rate, with a bound on the rate that holds on new rows.

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
    """Scores above `value` are flagged. Of rows like those it came from:"""

    value: float
    flagged: float  # the share of these rows that is flagged
    bound: float  # the bound on that share for new rows, true with probability `confidence`
    confidence: float

    def flag(self, scores: Tensor) -> Tensor:
        """(batch,) bool; NaN is flagged"""
        return ~(scores.to(torch.float64) <= self.value)


def threshold_at_fpr(scores: Tensor, fpr: float, confidence: float = 0.95) -> Threshold:
    """The lowest threshold that flags at most `fpr` of familiar rows, except with probability 1 - confidence.

    scores: (n,) of familiar (in-distribution) rows. An order statistic: no assumption but that new rows are like these.
    +inf, which flags nothing, when n is too small: log(1 - confidence) / log(1 - fpr) are needed.
    """
    check_rate(fpr, "fpr")
    check_rate(confidence, "confidence")
    ordered = check_scores(scores).sort().values
    n = ordered.numel()
    # with k rows at or below the k-th value, the share above it is at most Beta(n - k + 1, k) distributed; it exceeds
    # fpr with probability P(Binomial(n, fpr) <= n - k)
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
    """The highest threshold that flags at least `tpr` of unfamiliar rows, except with probability 1
    - confidence.

    scores: (n,) of unfamiliar (out-of-distribution) rows. -inf, which flags everything, when n is too small. bound is
    the lower bound on the share flagged.
    """
    mirrored = threshold_at_fpr(-check_scores(scores), 1 - tpr, confidence)
    if mirrored.value == math.inf:
        return Threshold(-math.inf, 1.0, 1.0, confidence)
    # flagged must include the value itself: step to the float just below it
    value = math.nextafter(-mirrored.value, -math.inf)
    flagged = float((check_scores(scores) > value).double().mean())
    return Threshold(value, flagged, 1 - mirrored.bound, confidence)
