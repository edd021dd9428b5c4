"""Bounds on a risk (mean loss) from a sample of losses, which hold with a stated probability.

Clopper, Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial, 1934,
https://doi.org/10.1093/biomet/26.4.404
Angelopoulos, Bates, Candès, Jordan, Lei, Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control,
2021, https://arxiv.org/abs/2110.01052 (Hoeffding-Bentkus p-value, sequences with several starts)
Wiens, A fixed sequence Bonferroni procedure for testing multiple endpoints, 2003, https://doi.org/10.1002/pst.64
(levels that pass on to the next test)
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from scipy.special import xlogy

_FIRST_SHARE = 0.75  # share of delta for the strictest start, the best one if the most certain rows have few losses


def risk_p_value(mean, n, risk: float, binary: bool):
    """The p-value of the hypothesis "the true mean loss is above risk", from the mean of n independent losses.

    mean: in [0, 1]. n: >= 1; both numbers or arrays. binary: losses are 0 or 1, and the exact binomial tail is used;
    for other losses in [0, 1] it is the smaller of Hoeffding's and Bentkus's bounds.
    """
    mean, n = np.asarray(mean, dtype=np.float64), np.asarray(n)
    # the sum of the losses, up to rounding
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
    """The upper bound that the true mean loss exceeds with probability at most delta; 1 if n is 0."""
    if n == 0:
        return 1.0
    if binary:
        count = round(mean * n)
        return 1.0 if count == n else float(stats.beta.ppf(1 - delta, count + 1, n - count))
    low, high = mean, 1.0
    # the p-value decreases with the risk; bisection finds where it crosses delta
    for _ in range(100):
        middle = 0.5 * (low + high)
        if middle < 1 and risk_p_value(mean, n, middle, False) > delta:
            low = middle
        else:
            high = middle
    return high


def starting_shares(kept: np.ndarray, risk: float, delta: float, several: bool) -> np.ndarray:
    """The initial share of delta for the test of each threshold, (cuts,), fixed before any loss is seen.

    kept: (cuts,) numbers of rows that thresholds keep, ascending.
    several: False: all of delta starts at the fewest rows that could pass without a loss. True: three quarters of delta
        start there, the rest in equal parts at as many doublings of that number as fit, so that a chance loss among the
        first few rows does not stop all tests.
    """

    def fewest(share: float) -> int:
        return math.ceil(math.log(share) / math.log1p(-risk) - 1e-9)

    def starts(count: int) -> list[tuple[int, float]]:
        if count == 1:
            return [(fewest(delta), delta)]
        first, share = fewest(_FIRST_SHARE * delta), (1 - _FIRST_SHARE) * delta / (count - 1)
        return [(first, _FIRST_SHARE * delta), *((max(first * 2**i, fewest(share)), share) for i in range(1, count))]

    count = 1
    while several and starts(count + 1)[-1][0] <= kept[-1]:
        count += 1
    shares = np.zeros(len(kept))
    for rows, share in starts(count):
        at = int(np.searchsorted(kept, rows))
        if at < len(kept):
            shares[at] += share
    return shares


def last_passed(p_values: np.ndarray, shares: np.ndarray) -> tuple[int, float]:
    """(index of the last test that passes, the level it passed at), or (-1, 0) if none passes.

    Each test's level is its own share plus the level of the test before it, if that passed (fixed-sequence
    Bonferroni). The probability of rejecting any true hypothesis is at most the sum of the shares, however the tests
    depend on each other.
    """
    level, best, at = 0.0, -1, 0.0
    for i, (p, share) in enumerate(zip(p_values.tolist(), shares.tolist(), strict=True)):
        level += share
        if level > 0 and p <= level * (1 + 1e-12):
            best, at = i, level
        else:
            level = 0.0
    return best, at


def lowest_passing(passes: Callable[[float], bool], risk: float) -> float:
    """The lowest risk above `risk` that passes, rounded up to three digits; 1 if none does."""
    low, high = risk, None
    for asked in risk + (1 - risk) * np.linspace(0, 1, 42)[1:-1]:
        if passes(float(asked)):
            high = float(asked)
            break
        low = float(asked)
    if high is None:
        return 1.0
    for _ in range(12):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if passes(middle) else (middle, high)
    unit = 10.0 ** (math.floor(math.log10(high)) - 2)
    for more in range(20):  # a slightly higher risk may fail, because its tests start elsewhere
        rounded = float(f"{(math.ceil(high / unit - 1e-9) + more) * unit:.3g}")
        if rounded < 1 and passes(rounded):
            return rounded
    return high
