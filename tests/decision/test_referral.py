import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from vbdl import metrics
from vbdl.decision import REFER, Referral, ReferralBudget, refer_most_uncertain, uncertainty_of
from vbdl.decision.guarantee import risk_p_value, risk_upper_bound


def _task(n, seed):
    """Uncertainty uniform, P(error) = u² / 2: the risk below a threshold t is t² / 6."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return u, torch.rand(n, generator=generator, dtype=torch.float64) < u**2 / 2


@pytest.mark.parametrize("method", ["sgr", "ltt"])
@pytest.mark.parametrize("n", [60, 1000])
def test_guaranteed_risk_fails_no_more_often_than_delta(method, n):
    target, delta, repeats, failures, coverage = 0.06, 0.1, 400, 0, []
    for seed in range(repeats):
        u, wrong = _task(n, seed)
        rule = Referral().for_risk(u, wrong, target, delta, method)
        threshold = min(1.0, max(0.0, float(rule.threshold)))
        failures += threshold**2 / 6 > target
        coverage.append(threshold)
    # at most delta, up to the binomial noise of this many repeats (p < 1e-6)
    assert failures <= stats.binom.ppf(1 - 1e-6, repeats, delta)
    if n == 1000:
        # and not by referring everything: 0.6 could be kept
        assert np.mean(coverage) > 0.35


def test_the_certificate_bounds_the_risk_that_it_names():
    u, wrong = _task(2000, 0)
    rule = Referral().for_risk(u, wrong, 0.05)
    c = rule.certificate
    assert c is not None and c.n == 2000 and 0 < c.n_kept < 2000
    kept = ~rule.refer(u)
    assert int(kept.sum()) == c.n_kept and c.coverage == c.n_kept / 2000
    errors = int(wrong[kept].sum())
    assert errors / c.n_kept < c.risk_bound <= 0.05
    # the bisection takes 11 steps at most for 2000 rows, each tested at its share of delta
    assert c.risk_bound == pytest.approx(stats.beta.ppf(1 - 0.05 / 11, errors + 1, c.n_kept - errors), rel=1e-9)


def test_nothing_can_be_promised_from_few_rows():
    # 10 rows without an error allow 1 - 0.05^(1/10) = 26 %
    rule = Referral().for_risk(torch.arange(10.0), torch.zeros(10), 0.05)
    assert float(rule.threshold) == -math.inf and rule.certificate.n_kept == 0
    assert bool(rule.refer(torch.tensor([-1e9, 0.0])).all())
    with pytest.raises(ValueError, match="every row is referred"):
        rule.check(torch.zeros(2), torch.zeros(2))


def test_constant_uncertainty_keeps_all_or_none():
    u = torch.zeros(500)
    good = Referral().for_risk(u, torch.zeros(500), 0.05, method="ltt")
    assert good.certificate.n_kept == 500 and not bool(good.refer(u).any())
    bad = Referral().for_risk(u, torch.arange(500) % 2 == 0, 0.05)
    assert bad.certificate.n_kept == 0


@pytest.mark.parametrize("method", ["sgr", "ltt"])
def test_guarantee_for_losses_between_zero_and_one(method):
    failures, target = 0, 0.2
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(400, generator=generator, dtype=torch.float64)
        loss = u * torch.rand(400, generator=generator, dtype=torch.float64)  # risk below t: t / 4
        threshold = min(1.0, float(Referral().for_risk(u, loss, target, 0.1, method).threshold))
        failures += threshold / 4 > target
    assert failures <= stats.binom.ppf(1 - 1e-6, 200, 0.1)
    with pytest.raises(ValueError, match=r"losses in \[0, 1\]"):
        Referral().for_risk(u, loss * 10, target)


def test_binomial_bound_is_clopper_pearson():
    for errors, n in ((0, 10), (3, 50), (50, 50)):
        bound = risk_upper_bound(errors / n, n, 0.05, True)
        exact = stats.binomtest(errors, n).proportion_ci(0.90, method="exact").high
        assert bound == pytest.approx(exact, rel=1e-9)
        if errors < n:
            assert risk_p_value(errors / n, n, bound, True) == pytest.approx(0.05, rel=1e-6)
    # the general bound is wider than the exact one, and its p-value crosses delta there
    general = risk_upper_bound(0.06, 50, 0.05, False)
    assert general > risk_upper_bound(0.06, 50, 0.05, True)
    assert risk_p_value(0.06, 50, general + 1e-9, False) <= 0.05
    assert risk_p_value(0.06, 50, general - 1e-6, False) > 0.05
    assert risk_upper_bound(0.0, 0, 0.05, True) == 1.0


def test_general_p_value_is_valid_for_a_fair_coin_of_losses():
    # P(p <= a) <= a where the true mean equals the risk, for beta-distributed losses
    rng = np.random.default_rng(0)
    losses = rng.beta(0.5, 4.5, (4000, 60))
    p = np.array([risk_p_value(m, 60, 0.1, False) for m in losses.mean(1)])
    for a in (0.01, 0.05, 0.2):
        assert (p <= a).mean() <= a


def test_capacity():
    u = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    assert Referral().for_capacity(u, 0.4).refer(u).tolist() == [False, True, False, True, False]
    assert not bool(Referral().for_capacity(u, 0.0).refer(u).any())
    assert bool(Referral().for_capacity(u, 1.0).refer(u).all())
    # ties are not cut apart: no more than the share
    tied = torch.tensor([0.5, 0.5, 0.5, 0.1])
    assert not bool(Referral().for_capacity(tied, 0.5).refer(tied).any())
    assert int(Referral().for_capacity(tied, 0.75).refer(tied).sum()) == 3


def test_least_cost_is_the_best_of_all_thresholds():
    u, wrong = _task(300, 4)
    rule = Referral().for_cost(u, wrong.double(), 0.2)
    refer = rule.refer(u)
    ours = float(wrong[~refer].sum() + 0.2 * refer.sum())
    best = min(float(wrong[u < t].sum() + 0.2 * (u >= t).sum()) for t in [*u.tolist(), math.inf])
    assert ours == pytest.approx(best, rel=1e-12)


def test_actions_of_a_prediction():
    probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    p = SimpleNamespace(probs=probs, label=probs.argmax(1), total=torch.tensor([0.3, 0.67]))
    assert Referral("total", 0.5)(p).tolist() == [0, REFER]
    assert Referral("confidence", 0.5)(p).tolist() == [0, 1]
    np.testing.assert_allclose(uncertainty_of(p, "confidence"), [0.1, 0.4], atol=1e-7)
    binary = SimpleNamespace(probs=torch.tensor([0.9, 0.4]))
    np.testing.assert_allclose(uncertainty_of(binary, "confidence"), [0.1, 0.4], atol=1e-7)
    assert uncertainty_of(SimpleNamespace(total=torch.ones(3, 1))).shape == (3,)
    with pytest.raises(ValueError, match="one number a row"):
        uncertainty_of(SimpleNamespace(total=torch.ones(3, 2)))
    for refused in (lambda: uncertainty_of(p, "other"), lambda: Referral("other")):
        with pytest.raises(ValueError, match="kind"):
            refused()


def test_nan_is_always_referred():
    u = torch.tensor([math.nan, 0.1])
    assert Referral().refer(u).tolist() == [True, False]
    assert refer_most_uncertain(u, 1).tolist() == [True, False]
    with pytest.raises(ValueError, match="NaN"):
        Referral().for_capacity(u, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        Referral(threshold=math.nan)


def test_most_uncertain_are_exactly_k_with_ties_by_row():
    u = torch.tensor([0.5, 0.9, 0.5, 0.5])
    assert refer_most_uncertain(u, 2).tolist() == [True, True, False, False]
    assert refer_most_uncertain(u, 0).sum() == 0
    with pytest.raises(ValueError, match="k must lie"):
        refer_most_uncertain(u, 5)


def test_daily_budget_is_never_exceeded_and_finds_the_uncertain():
    reference = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    day = ReferralBudget(reference, 20, 200)
    rng = np.random.default_rng(0)
    hit, top = 0, 0
    for _ in range(30):
        day.new_day()
        u = rng.random(200)
        referred = np.array([day.step(x) for x in u])
        assert referred.sum() <= 20
        hit += u[referred].sum()
        top += np.sort(u)[-20:].sum()
    # an online rule cannot see the evening: within a few percent of the best hindsight
    assert hit > 0.95 * top
    day.new_day()
    assert sum(day.step(1.0) for _ in range(500)) == 20
    day.new_day()
    assert day.step(math.nan)


def test_check_tells_when_the_promise_is_broken_by_a_shift():
    u, wrong = _task(4000, 0)
    rule = Referral().for_risk(u, wrong, 0.05)
    same = rule.check(*_task(4000, 1))
    assert same.lower <= 0.05
    shifted_u, _ = _task(4000, 2)
    worse = torch.rand(4000, generator=torch.Generator().manual_seed(3)) < 0.2
    assert rule.check(shifted_u, worse).lower > 0.05
    assert isinstance(same, metrics.Interval)
