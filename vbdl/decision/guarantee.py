"""Bounds on a risk from a sample of losses, that hold with a stated probability.

Clopper, Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial,
1934,
https://doi.org/10.1093/biomet/26.4.404
Angelopoulos, Bates, Candès, Jordan, Lei, Learn then Test: Calibrating Predictive Algorithms to
Achieve
Risk Control, 2021, https://arxiv.org/abs/2110.01052 (Hoeffding-Bentkus p-value)
"""

import math

import numpy as np
from scipy import stats
from scipy.special import xlogy


def risk_p_value(mean, n, risk: float, binary: bool):
    """P-value of "the true mean loss is above risk", from the mean of n independent losses in [0, 1].

    mean, n: numbers or arrays of them, n >= 1. binary losses (0 or 1): the exact binomial tail; others: the
    smaller of Hoeffding's and Bentkus's bound.
    """
    mean, n = np.asarray(mean, dtype=np.float64), np.asarray(n)
    # a mean times n is a count that may have been rounded
    count = mean * n
    if binary:
        return stats.binom.cdf(np.round(count), n, risk)
    bentkus = math.e * stats.binom.cdf(np.ceil(count - 1e-9), n, risk)
    return np.minimum(1.0, np.minimum(_hoeffding(mean, n, risk), bentkus))


def _hoeffding(mean: np.ndarray, n: np.ndarray, risk: float) -> np.ndarray:
    low = np.minimum(mean, risk)
    divergence = xlogy(low, low / risk) + xlogy(1 - low, (1 - low) / (1 - risk))
    return np.exp(-n * divergence)


def risk_upper_bound(mean: float, n: int, delta: float, binary: bool) -> float:
    """The risk that the true mean loss exceeds with probability at most delta; 1 without rows."""
    if n == 0:
        return 1.0
    if binary:
        count = round(mean * n)
        return 1.0 if count == n else float(stats.beta.ppf(1 - delta, count + 1, n - count))
    low, high = mean, 1.0
    # the p-value falls in the risk; 100 halvings end at the last risk above delta
    for _ in range(100):
        middle = 0.5 * (low + high)
        if middle < 1 and risk_p_value(mean, n, middle, False) > delta:
            low = middle
        else:
            high = middle
    return high
