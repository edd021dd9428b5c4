import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from vbdl.decision import (
    AnomalyFlags,
    backtest,
    gaussian_tail,
    kelly_position,
    mean_variance_position,
    mixture_tail,
    sample_tail,
)


def _mixture(samples=6, batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(samples, batch, generator=generator, dtype=torch.float64)
    return means, torch.rand(samples, batch, generator=generator, dtype=torch.float64) + 0.2


def test_gaussian_tail_is_the_textbook():
    tail = gaussian_tail(torch.tensor([0.1]), torch.tensor([2.0]), 0.975)
    z = stats.norm.ppf(0.025)
    assert float(tail.var) == pytest.approx(-(0.1 + 2 * z), rel=1e-7)
    assert float(tail.es) == pytest.approx(-(0.1 - 2 * stats.norm.pdf(z) / 0.025), rel=1e-7)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99, 0.999])
def test_mixture_tail_is_the_integral(level):
    means, stds = _mixture()
    tail = mixture_tail(means, stds, level)
    for i in range(5):
        m, s = means[:, i].numpy(), stds[:, i].numpy()
        cdf = lambda t, m=m, s=s: stats.norm.cdf(t, m, s).mean()
        q = optimize.brentq(lambda t, cdf=cdf: cdf(t) - (1 - level), -30, 30, xtol=1e-13)
        assert float(tail.var[i]) == pytest.approx(-q, abs=1e-9)
        below = integrate.quad(lambda t, m=m, s=s: t * stats.norm.pdf(t, m, s).mean(), -30, q, epsabs=1e-13, limit=300)[
            0
        ]
        assert float(tail.es[i]) == pytest.approx(-below / (1 - level), abs=1e-7)
    assert bool((tail.es >= tail.var).all())


def test_parameter_uncertainty_fattens_the_tail():
    means, stds = torch.tensor([[-1.0], [0.0], [1.0]]), torch.ones(3, 1)
    known = gaussian_tail(torch.zeros(1), torch.ones(1), 0.99)
    unsure = mixture_tail(means, stds, 0.99)
    assert float(unsure.var) > float(known.var) + 0.3
    weighted = mixture_tail(means, stds, 0.99, torch.tensor([0.0, 1.0, 0.0]))
    assert float(weighted.var) == pytest.approx(float(known.var), rel=1e-9)


def test_sample_tail_is_exact_also_inside_a_sample():
    samples = torch.arange(10.0).unsqueeze(1)
    tail = sample_tail(samples, 0.8)
    assert float(tail.var) == -1.0 and float(tail.es) == -0.5
    # 2.5 samples: 0, 1 and half of 2
    tail = sample_tail(samples, 0.75)
    assert float(tail.var) == -2.0 and float(tail.es) == pytest.approx(-(0 + 1 + 1) / 2.5)
    with pytest.raises(ValueError, match="draw at least 100"):
        sample_tail(samples, 0.99)
    big = torch.from_numpy(np.random.default_rng(0).normal(size=(200_000, 1)))
    exact = gaussian_tail(torch.zeros(1), torch.ones(1), 0.99)
    assert float(sample_tail(big, 0.99).es) == pytest.approx(float(exact.es), abs=0.03)


def test_tail_refuses():
    with pytest.raises(ValueError, match="level"):
        gaussian_tail(torch.zeros(1), torch.ones(1), 1.0)
    with pytest.raises(ValueError, match="positive"):
        gaussian_tail(torch.zeros(1), torch.zeros(1), 0.9)
    with pytest.raises(ValueError, match="NaN"):
        sample_tail(torch.full((100, 1), math.nan), 0.9)


def test_kupiec_by_hand():
    # Kupiec's own table: 255 days at 99 %, non-rejection at 5 % below 7 violations
    def p(x):
        return backtest(torch.arange(255) < x, 0.99).kupiec

    assert p(6) > 0.05 > p(7)
    x, n, q = 7, 255, 0.01
    ratio = -2 * ((n - x) * math.log(1 - q) + x * math.log(q) - (n - x) * math.log(1 - x / n) - x * math.log(x / n))
    assert p(7) == pytest.approx(stats.chi2.sf(ratio, 1), rel=1e-10)


@pytest.mark.parametrize("level", [0.99, 0.975, 0.9])
@pytest.mark.parametrize("days", [2, 30, 250])
def test_the_exact_p_value_holds_at_any_number_of_days(days, level):
    """P(p <= a) <= a, from the binomial law itself; the asymptotic p-value does not keep it for 250 days at 99 %."""
    counts = np.arange(days + 1)
    found = [backtest(torch.arange(days) < x, level) for x in counts]
    law = stats.binom.pmf(counts, days, 1 - level)
    exact = np.array([b.kupiec_exact for b in found])
    for x in counts:  # as probable or less, summed by hand
        assert exact[x] == pytest.approx(law[law <= law[x] * (1 + 1e-7)].sum(), rel=1e-6, abs=1e-12)
    for a in (0.01, 0.05, 0.1):
        assert law[exact <= a].sum() <= a * (1 + 1e-9)
    if (days, level) == (250, 0.99):
        asymptotic = np.array([b.kupiec for b in found])
        assert law[asymptotic <= 0.05].sum() > 0.09


def test_independence_sees_clusters_and_only_those():
    apart = torch.arange(1000) % 100 == 0
    together = torch.arange(1000) < 10
    assert backtest(apart, 0.99).kupiec > 0.9 and backtest(together, 0.99).kupiec > 0.9
    assert backtest(apart, 0.99).independence > 0.5
    assert backtest(together, 0.99).independence < 1e-6
    assert backtest(together, 0.99).conditional < 1e-6


def test_independence_by_hand():
    # 0 0 1 0 0 1: of four days after a quiet one two are violations, of one after a violation none
    hits = torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.bool)
    apart = 2 * math.log(0.5) + 2 * math.log(0.5)
    pooled = 2 * math.log(2 / 5) + 3 * math.log(3 / 5)
    expected = stats.chi2.sf(2 * (apart - pooled), 1)
    assert backtest(hits, 0.9).independence == pytest.approx(expected, rel=1e-12)


def test_backtest_has_its_size():
    # p-values below 5 % about as often as that, for independent violations of the right rate
    rng = np.random.default_rng(0)
    hits = torch.from_numpy(rng.random((400, 1000)) < 0.05)
    results = [backtest(row, 0.95) for row in hits]
    for name in ("kupiec", "independence", "conditional"):
        rejected = np.mean([getattr(r, name) < 0.05 for r in results])
        assert 0.02 <= rejected <= 0.09, (name, rejected)


def test_backtest_ends():
    none = backtest(torch.zeros(100, dtype=torch.bool), 0.95)
    assert none.violations == 0 and none.independence == 1.0
    assert none.kupiec == pytest.approx(stats.chi2.sf(-200 * math.log(0.95), 1), rel=1e-9)
    every = backtest(torch.ones(5, dtype=torch.bool), 0.95)
    assert every.kupiec < 1e-4 and every.independence == 1.0
    with pytest.raises(ValueError, match="two days"):
        backtest(torch.zeros(1, dtype=torch.bool), 0.95)
    with pytest.raises(ValueError, match="bool"):
        backtest(torch.zeros(5), 0.95)


def test_mean_variance_shrinks_with_epistemic_variance():
    mean, aleatoric = torch.tensor([0.02, -0.02]), torch.tensor([0.04, 0.04])
    known = mean_variance_position(mean, aleatoric, 2.0)
    np.testing.assert_allclose(known, [0.25, -0.25], rtol=1e-6)
    unsure = mean_variance_position(mean, aleatoric + 0.04, 2.0)
    np.testing.assert_allclose(unsure, [0.125, -0.125], rtol=1e-6)
    assert mean_variance_position(mean * 100, aleatoric).tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="positive"):
        mean_variance_position(mean, aleatoric * 0)


def test_kelly_of_a_coin_is_kellys():
    # wins 1 with 0.6, loses 1 (almost) with 0.4: stake p - q
    returns = torch.tensor([1.0] * 6 + [-0.9999999] * 4, dtype=torch.float64).unsqueeze(1)
    assert float(kelly_position(returns, 1.0)) == pytest.approx(0.2, abs=1e-6)
    assert float(kelly_position(returns)) == pytest.approx(0.1, abs=1e-6)


def test_kelly_is_the_maximum_and_shrinks_when_the_mean_is_unsure():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 4000)
    known = 0.01 + noise
    unsure = 0.01 + noise + 0.1 * np.repeat([-1, 1], 2000)
    growth = lambda w: -np.log1p(w * known).mean()
    best = optimize.minimize_scalar(growth, bounds=(0, 1), method="bounded", options={"xatol": 1e-10})
    positions = kelly_position(torch.from_numpy(np.stack([known, unsure], 1)), 1.0, limit=2.0)
    assert float(positions[0]) == pytest.approx(best.x, abs=1e-5)
    assert float(positions[1]) < 0.7 * float(positions[0])


def test_kelly_ends():
    assert kelly_position(torch.full((3, 1), 0.1), 1.0, limit=1.5).item() == pytest.approx(1.5)
    assert kelly_position(torch.zeros(3, 1)).item() == 0.0
    # no stake at which the worst sample ruins
    ruin = kelly_position(torch.tensor([[10.0], [-0.5]]), 1.0, limit=100.0)
    assert float(ruin) < 2.0
    with pytest.raises(ValueError, match="-100"):
        kelly_position(torch.tensor([[-1.0]]))


def test_false_alarms_stay_within_the_budget():
    rates, n, budget = [], 99, 0.05
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n + 200, generator=generator)
        rates.append(float(AnomalyFlags().fit(x[:n]).flag(x[n:], budget).double().mean()))
    # exact for continuous scores: the mean is floor(budget (n + 1)) / (n + 1) = 0.05
    error = np.std(rates) / math.sqrt(300)
    assert abs(np.mean(rates) - 0.05) < 4 * error


def test_false_discovery_rate():
    shares = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        flags = AnomalyFlags().fit(torch.randn(1000, generator=generator))
        x = torch.randn(200, generator=generator) + (torch.arange(200) < 40) * 4.0
        found = flags.flag_fdr(x, 0.1)
        shares.append(float(found[40:].sum()) / max(1, int(found.sum())))
        assert int(found[:40].sum()) >= 15
    assert np.mean(shares) < 0.1 + 3 * np.std(shares) / math.sqrt(200)


def test_p_values_by_hand_and_what_cannot_be_flagged():
    flags = AnomalyFlags().fit(torch.tensor([1.0, 2.0, 3.0]))
    assert flags.p_values(torch.tensor([0.0, 2.0, 5.0, math.nan])).tolist() == [1.0, 0.75, 0.25, 0.25]
    assert flags.flag(torch.tensor([2.0, 5.0]), 0.25).tolist() == [False, True]
    with pytest.raises(ValueError, match="nothing could ever be flagged"):
        flags.flag(torch.tensor([5.0]), 0.2)
    assert not bool(flags.flag_fdr(torch.zeros(4), 0.1).any())
    assert flags.flag_fdr(torch.zeros(0), 0.1).shape == (0,)
    with pytest.raises(RuntimeError, match="fit first"):
        AnomalyFlags().p_values(torch.zeros(1))
