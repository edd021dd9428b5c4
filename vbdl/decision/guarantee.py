"""Bounds on a risk from a sample of losses, that hold with a stated probability.

Clopper, Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial,
1934,
https://doi.org/10.1093/biomet/26.4.404
Angelopoulos, Bates, Candès, Jordan, Lei, Learn then Test: Calibrating Predictive Algorithms to
Achieve
Risk Control, 2021, https://arxiv.org/abs/2110.01052 (Hoeffding-Bentkus p-value, sequences with several starts)
Wiens, A fixed sequence Bonferroni procedure for testing multiple endpoints, 2003, https://doi.org/10.1002/pst.64 (a
level that passes on)
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from scipy.special import xlogy

_FIRST_SHARE = 0.75  # of delta, for the strictest start: where few losses are among the certain rows it is the best one


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


def starting_shares(kept: np.ndarray, risk: float, delta: float, several: bool) -> np.ndarray:
    """The share of delta that each number of kept rows starts with, (cuts,), fixed before any loss is seen.

    kept: numbers of rows that thresholds can keep, ascending. One start is the fewest rows that could pass without a
    loss. Several are that, with three quarters of delta, and as many of its doublings as fit, which share the rest:
    where chance puts a loss among the first few rows, the next start is not held up by it.
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
    """The index of the last test in order that passes, and the level it passed at; (-1, 0) if none does.

    A test that passes hands its level on to the next, one that fails loses it, each adds the share of its own: the
    probability that any true hypothesis is rejected is at most the sum of the shares, however the tests depend on each
    other.
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
    """The lowest risk above this one, to three digits and rounded up, that passes; 1 where none does."""
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
    for more in range(20):  # what passes at a risk need not at one a little higher: tests begin elsewhere
        rounded = float(f"{(math.ceil(high / unit - 1e-9) + more) * unit:.3g}")
        if rounded < 1 and passes(rounded):
            return rounded
    return high
