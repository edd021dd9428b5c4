"""Backtests of a value at risk: tests that violations are as frequent as stated and do not cluster.

Kupiec, Techniques for Verifying the Accuracy of Risk Measurement Models, 1995, https://doi.org/10.3905/jod.1995.407942
Christoffersen, Evaluating Interval Forecasts, 1998, https://doi.org/10.2307/2527341
"""

from dataclasses import dataclass

import torch
from scipy import stats
from scipy.special import xlogy
from torch import Tensor

from vbdl.metrics._checks import check_rate


@dataclass(frozen=True)
class Backtest:
    """The results of tests of a value at risk; small p-values are evidence against the model.

    kupiec, independence and conditional are likelihood-ratio tests with asymptotic p-values, which are wrong by a
    factor if fewer than about ten violations are expected (250 days at 99 % have 2.5). kupiec_exact tests the same
    hypothesis as kupiec and is valid for any number of days.

    >>> violations = torch.arange(1000) % 100 == 0
    >>> found = vbdl.decision.backtest(violations, level=0.99)
    >>> found.violations, round(found.expected)
    (10, 10)
    """

    n: int
    violations: int
    expected: float
    kupiec: float  # p-value of "violations have the stated rate", asymptotic
    independence: float  # p-value of "violations do not cluster" (first-order), asymptotic
    conditional: float  # p-value of both together, asymptotic
    kupiec_exact: float  # p-value of "violations have the stated rate", two-sided binomial, exact


def backtest(violations: Tensor, level: float) -> Backtest:
    """Test a value at risk against observed violations.

    violations: (days,) bool in time order, y < -VaR. level: of the VaR, e.g. 0.99.
    If no day or every day is a violation, clustering cannot be tested and independence is 1. Raises ValueError for
    fewer than two days.

    >>> violations = torch.zeros(1000, dtype=torch.bool)
    >>> violations[::50] = True  # 20 days, where 10 are expected
    >>> round(vbdl.decision.backtest(violations, level=0.99).kupiec_exact, 4)
    0.0038
    """
    check_rate(level, "level")
    if violations.dtype != torch.bool or violations.ndim != 1:
        raise ValueError(f"violations must be (days,) bool, not {tuple(violations.shape)} {violations.dtype}")
    if violations.numel() < 2:
        raise ValueError(f"a backtest needs at least two days, there are {violations.numel()}")
    hits = violations.cpu()
    n, x, p = hits.numel(), int(hits.sum()), 1 - level
    kupiec = 2 * (_log_likelihood(x, n, x / n) - _log_likelihood(x, n, p))
    before, after = hits[:-1], hits[1:]
    n11, n01 = int((before & after).sum()), int((~before & after).sum())
    from1, from0 = int(before.sum()), int((~before).sum())
    pooled = (n11 + n01) / (n - 1)
    apart = _log_likelihood(n11, from1, n11 / max(1, from1)) + _log_likelihood(n01, from0, n01 / max(1, from0))
    independence = max(0.0, 2 * (apart - _log_likelihood(n11 + n01, n - 1, pooled)))
    return Backtest(
        n=n,
        violations=x,
        expected=n * p,
        kupiec=float(stats.chi2.sf(max(0.0, kupiec), 1)),
        independence=float(stats.chi2.sf(independence, 1)),
        conditional=float(stats.chi2.sf(max(0.0, kupiec) + independence, 2)),
        kupiec_exact=float(stats.binomtest(x, n, p).pvalue),
    )


def _log_likelihood(hits: int, n: int, p: float) -> float:
    """The Bernoulli log-likelihood log p^hits (1 - p)^(n - hits), with 0 log 0 = 0."""
    return float(xlogy(hits, p) + xlogy(n - hits, 1 - p))
