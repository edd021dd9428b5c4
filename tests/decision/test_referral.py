import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import vbdl
from vbdl import metrics
from vbdl.artifact.modules import describe, rebuild
from vbdl.decision import REFER, Referral, ReferralBudget, refer_most_uncertain, uncertainty_of
from vbdl.decision.distribution import Evidence
from vbdl.decision.guarantee import last_passed, risk_p_value, risk_upper_bound, starting_shares


def _task(n, seed):
    """Uncertainty uniform, P(error) = u² / 2: the risk below a threshold t is t² / 6."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return u, torch.rand(n, generator=generator, dtype=torch.float64) < u**2 / 2


def _for_risk(*arguments):
    """Where nothing can be promised it warns, which is tested on its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Referral().for_risk(*arguments)


# few rows and many; those between are slow
SIZES = [60, pytest.param(300, marks=pytest.mark.slow), 1000]


@pytest.mark.parametrize("method", ["sgr", "ltt"])
@pytest.mark.parametrize("n", SIZES)
def test_guaranteed_risk_fails_no_more_often_than_delta(method, n):
    target, delta, repeats, failures, coverage = 0.06, 0.1, 400, 0, []
    for seed in range(repeats):
        u, wrong = _task(n, seed)
        rule = _for_risk(u, wrong, target, delta, method)
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
    # at the level of its test, which is at most delta and at least the share of one start
    level = stats.binom.cdf(errors, c.n_kept, c.risk_bound)
    assert 0.05 / 40 < level <= 0.05 * (1 + 1e-9)


@pytest.mark.parametrize("n", [46, 47, 60, 77, 90, 91, 300])
def test_all_is_kept_where_no_row_is_wrong(n):
    """A bisection begins in the middle, where half the rows are too few for any promise, and goes down from there."""
    for method in ("sgr", "ltt"):
        rule = Referral().for_risk(torch.linspace(0, 1, n), torch.zeros(n), 0.1, 0.05, method)
        assert rule.certificate.n_kept == n and float(rule.threshold) == math.inf
    tied = Referral().for_risk(torch.arange(n) // 7, torch.zeros(n), 0.1, 0.05)
    assert tied.certificate.n_kept == n


_KINDS = {
    "rising": lambda u: u**2 / 2,
    "flat and low": lambda u: 0 * u + 0.02,
    "bad among the certain": lambda u: torch.where(u < 0.1, 0.2, 0.01).to(u.dtype),
    "at the risk itself": lambda u: 0 * u + 0.0600001,
}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.slow_where(
    cell=lambda p: p["kind"] == "at the risk itself" and p["n"] > 60
)  # few rows are the harder ones
def test_coverage_is_found_and_the_promise_kept(kind, n):
    target, delta, repeats, broken, found = 0.06, 0.1, 300, 0, {"sgr": [], "ltt": []}
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    risk_below = _KINDS[kind](grid).cumsum(0) / torch.arange(1, 20_002)
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        wrong = torch.rand(n, generator=generator, dtype=torch.float64) < _KINDS[kind](u)
        for method, kept in found.items():
            rule = _for_risk(u, wrong, target, delta, method)
            kept.append(rule.certificate.n_kept)
            if method == "sgr" and kept[-1]:
                broken += float(risk_below[int(20_000 * min(1.0, float(rule.threshold)))]) > target
    assert broken <= stats.binom.ppf(1 - 1e-6, repeats, delta)
    sgr, ltt = (np.array(found[m]) for m in ("sgr", "ltt"))
    assert (sgr >= ltt).mean() > 0.6
    if kind != "at the risk itself" and n >= 300:
        assert sgr.mean() >= 0.95 * ltt.mean()
    if kind == "flat and low" and n >= 300:
        assert (sgr > 0).mean() > (ltt > 0).mean() + 0.1


def test_levels_pass_on_and_sum_to_delta():
    """By hand: what fails loses its level, what passes hands it on, and each start adds its own."""
    shares = np.array([0.03, 0.0, 0.02, 0.0, 0.0])
    assert last_passed(np.array([0.01, 0.02, 0.05, 0.05, 0.06]), shares) == (3, 0.05)
    assert last_passed(np.array([0.04, 0.0, 0.02, 0.03, 0.0]), shares) == (2, 0.02)
    assert last_passed(np.ones(5), shares) == (-1, 0.0)
    for n in (10, 29, 30, 80, 1000, 10_000):
        for several in (True, False):
            made = starting_shares(np.arange(1, n + 1), 0.1, 0.05, several)
            assert made.sum() == pytest.approx(0.05 if n >= 29 else 0.0)
            assert several or (made > 0).sum() <= 1


@pytest.mark.parametrize("method", ["sgr", "ltt"])
def test_a_refusal_says_what_could_have_been_promised(method):
    u = torch.linspace(0, 1, 80)
    for wrong in (torch.zeros(80), (torch.arange(80) % 9 == 8).double()):
        with pytest.warns(
            UserWarning, match="every row is referred.* The lowest risk that these 80 rows can guarantee"
        ):
            rule = Referral().for_risk(u, wrong, 0.01, method=method)
        lowest = rule.certificate.lowest_risk
        assert rule.certificate.n_kept == 0 and 0.01 < lowest < 1
        # asked for as it is printed, it is promised; a hundredth less is not
        assert Referral().for_risk(u, wrong, float(f"{lowest:.3g}"), method=method).certificate.n_kept > 0
        assert _for_risk(u, wrong, 0.98 * lowest, 0.05, method).certificate.n_kept == 0
        nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
        predict = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.Categorical(), compile=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # for_risk has said it
            deciding = vbdl.with_decision(predict, rule)
        again = rebuild(describe(rule), dict(rule.state_dict()))
        with pytest.warns(UserWarning, match=f"can guarantee a risk of at most 0.01 .* is {lowest:.3g}"):
            vbdl.with_decision(predict, again)
        assert again.certificate.risk_bound == 1.0 and "no guarantee" in str(again.certificate)
        assert again.certificate == rule.certificate and bool((deciding(torch.randn(5, 2)).action == REFER).all())
    # one of version 0.1, which recorded no such risk
    with pytest.warns(UserWarning, match="Calibrate on more rows than these 80"):
        rule.certificate = dataclasses.replace(rule.certificate, lowest_risk=None)
        vbdl.with_decision(predict, rule)


def test_a_refusal_blames_the_ranking_and_not_the_number_of_rows():
    """The uncertainty says nothing about errors: half of the surest rows are wrong, and more rows are no remedy."""
    with pytest.warns(UserWarning, match="its mean loss is 0.5, and 0.5 on the half that it is surest of") as told:
        Referral().for_risk(torch.linspace(0, 1, 400), torch.arange(400) % 2 == 0, 0.05)
    assert "more rows" not in str(told[0].message)


def test_nothing_can_be_promised_from_few_rows():
    # 10 rows without an error allow 1 - 0.05^(1/10) = 26 %
    rule = _for_risk(torch.arange(10.0), torch.zeros(10), 0.05)
    assert float(rule.threshold) == -math.inf and rule.certificate.n_kept == 0
    assert bool(rule.refer(torch.tensor([-1e9, 0.0])).all())
    with pytest.raises(ValueError, match="every row is referred"):
        rule.check(torch.zeros(2), torch.zeros(2))


def test_constant_uncertainty_keeps_all_or_none():
    u = torch.zeros(500)
    good = Referral().for_risk(u, torch.zeros(500), 0.05, method="ltt")
    assert good.certificate.n_kept == 500 and not bool(good.refer(u).any())
    bad = _for_risk(u, torch.arange(500) % 2 == 0, 0.05)
    assert bad.certificate.n_kept == 0


@pytest.mark.parametrize("method", ["sgr", "ltt"])
def test_guarantee_for_losses_between_zero_and_one(method):
    failures, target = 0, 0.2
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(400, generator=generator, dtype=torch.float64)
        loss = u * torch.rand(400, generator=generator, dtype=torch.float64)  # risk below t: t / 4
        threshold = max(0.0, min(1.0, float(_for_risk(u, loss, target, 0.1, method).threshold)))
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
    p = Evidence(probs=probs, label=probs.argmax(1), total=torch.tensor([0.3, 0.67]))
    assert Referral("total", 0.5)(p).tolist() == [0, REFER]
    assert Referral("confidence", 0.5)(p).tolist() == [0, 1]
    np.testing.assert_allclose(uncertainty_of(p, "confidence"), [0.1, 0.4], atol=1e-7)
    binary = Evidence(probs=torch.tensor([0.9, 0.4]))
    np.testing.assert_allclose(uncertainty_of(binary, "confidence"), [0.1, 0.4], atol=1e-7)
    assert uncertainty_of(Evidence(total=torch.ones(3, 1))).shape == (3,)
    with pytest.raises(ValueError, match="one number per row"):
        uncertainty_of(Evidence(total=torch.ones(3, 2)))
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
