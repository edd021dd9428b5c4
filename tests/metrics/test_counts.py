"""Every count made from a rate, against exact rational arithmetic, however the rate was written."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from vbdl.calibration import conformal_quantile, conformal_rank
from vbdl.calibration.adaptive_conformal import AdaptiveConformal
from vbdl.calibration.conformal import ConformalSets
from vbdl.calibration.conformal_intervals import CQR, AbsoluteIntervals, NormalizedIntervals
from vbdl.decision import AnomalyFlags, Referral, sample_tail
from vbdl.metrics import risk_at_coverage
from vbdl.metrics._counts import at_least, at_most

_RATES = [Fraction(k, 40) for k in range(1, 40)] + [Fraction(k, 1000) for k in (1, 5, 7, 29, 333, 995, 999)]
_ROWS = [*range(1, 61), 99, 100, 499, 500, 999, 1499, 1500, 9_999, 10_000, 99_999, 1_000_000]


def _written(rate: Fraction) -> list[float]:
    """The ways in which a program comes by this rate, each with its rounding."""
    one = float(rate)
    return [one, 1 - float(1 - rate), 1 - (1 - one), sum([one / 10] * 10), float(np.float64(1) - float(1 - rate))]


@pytest.mark.parametrize("rate", _RATES, ids=str)
def test_counts_are_those_of_rational_arithmetic(rate):
    for written in _written(rate):
        for n in _ROWS:
            assert at_most(written, n) == math.floor(rate * n), (written, n)
            assert at_least(written, n) == math.ceil(rate * n), (written, n)
            assert conformal_rank(n, written) == math.ceil((n + 1) * (1 - rate)), (written, n)


@pytest.mark.parametrize("coverage", [0.9, 0.95, 0.8, 0.7, 0.55, 0.975])
def test_an_alpha_and_its_coverage_give_every_calibrator_one_threshold(coverage):
    """1 - 0.9 is not 0.1 in binary; the threshold is that of the exact rank for both."""
    alpha = Fraction(1) - Fraction(str(coverage))
    for n in range(int(1 / alpha) - 1, 120):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double() + 1
        rank = math.ceil((n + 1) * (1 - alpha))
        expected = float(rank) if rank <= n else math.inf
        zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        adaptive = AdaptiveConformal(1 - coverage)
        adaptive.scores.extend(order.tolist())
        assert float(conformal_quantile(order, 1 - coverage)) == expected
        assert adaptive.threshold() == expected
        assert float(AbsoluteIntervals(1 - coverage).fit(zero, order).threshold) == expected
        assert float(NormalizedIntervals(1 - coverage).fit(zero, one, order).threshold) == expected
        assert float(CQR(1 - coverage).fit(zero, zero, order).threshold) == expected
        probs = torch.stack((1 - order / (n + 2), order / (n + 2)), 1)
        for per_class in (False, True):
            sets = ConformalSets(1 - coverage, per_class=per_class).fit(probs, torch.zeros(n, dtype=torch.int64))
            assert float(sets.thresholds[0]) == pytest.approx(expected / (n + 2), rel=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.05, 0.45, 0.2])
def test_decisions_count_as_calibrators_do(share):
    exact = Fraction(str(share))
    for n in range(1, 120):
        u = torch.arange(float(n))
        for written in (share, 1 - (1 - share)):
            assert int(Referral().for_capacity(u, written).refer(u).sum()) == math.floor(exact * n)
            if exact * (n + 1) >= 1:
                flags = AnomalyFlags(written).fit(u)
                assert int(flags.flag(u, written).sum()) == math.floor(exact * (n + 1)) - 1
            else:
                with pytest.raises(ValueError, match=f"at least {math.ceil(1 / exact) - 1} normal rows"):
                    AnomalyFlags(written).fit(u)
            assert risk_at_coverage(u, u, written) == pytest.approx((max(1, math.ceil(exact * n)) - 1) / 2)
        if exact * n >= 1:
            tail = sample_tail(torch.arange(float(n)).unsqueeze(1), 1 - share)
            assert float(tail.var) == -(math.ceil(exact * n) - 1)
