import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vbdl import metrics


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_ties_count_as_the_mean_over_all_orders(n, levels, seed):
    rng = np.random.default_rng(seed)
    uncertainty, loss = rng.integers(0, levels, n), rng.random(n)
    curves = []
    for order in itertools.permutations(range(n)):
        if (np.diff(uncertainty[list(order)]) >= 0).all():
            curves.append(np.cumsum(loss[list(order)]) / np.arange(1, n + 1))
    curve = metrics.risk_coverage(torch.from_numpy(uncertainty), torch.from_numpy(loss))
    np.testing.assert_allclose(curve.risk, np.mean(curves, axis=0), rtol=1e-12)


def test_by_hand():
    uncertainty = torch.tensor([0.1, 0.2, 0.3, 0.4])
    loss = torch.tensor([False, True, False, True])
    risks = [0, 1 / 2, 1 / 3, 1 / 2]
    assert metrics.aurc(uncertainty, loss) == pytest.approx(sum(risks) / 4, rel=1e-14)
    best = (0 + 0 + 1 / 3 + 1 / 2) / 4
    assert metrics.excess_aurc(uncertainty, loss) == pytest.approx(sum(risks) / 4 - best, rel=1e-14)
    assert metrics.risk_at_coverage(uncertainty, loss, 0.75) == pytest.approx(1 / 3)
    assert metrics.risk_at_coverage(uncertainty, loss, 0.51) == pytest.approx(1 / 3)
    assert metrics.coverage_at_risk(uncertainty, loss, 0.4) == 0.75
    assert metrics.coverage_at_risk(uncertainty, loss, 0.0) == 0.25
    assert metrics.coverage_at_risk(uncertainty, loss, 0.5) == 1.0


def test_perfect_order_has_no_excess_and_constant_uncertainty_keeps_the_mean():
    loss = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert metrics.excess_aurc(loss, loss) == 0.0
    assert metrics.aurc(torch.zeros(50), loss) == pytest.approx(float(loss.mean()), rel=1e-12)
    # a constant uncertainty offers two cuts: everything or nothing
    assert metrics.coverage_at_risk(torch.zeros(50), loss, float(loss.mean()) - 1e-6) == 0.0


def test_one_row_and_none():
    one = torch.tensor([0.5])
    assert metrics.aurc(one, one) == 0.5 and metrics.excess_aurc(one, one) == 0.0
    with pytest.raises(ValueError, match="no rows"):
        metrics.aurc(one[:0], one[:0])
    with pytest.raises(ValueError, match="coverage"):
        metrics.risk_at_coverage(one, one, 0.0)


def test_rounding_does_not_keep_one_row_more():
    # 0.07 * 100 is 7.000000000000001 in binary
    uncertainty = torch.arange(100.0)
    loss = (uncertainty == 7).double()
    assert metrics.risk_at_coverage(uncertainty, loss, 0.07) == 0.0
