import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vbdl import metrics
from vbdl.calibration import (
    APS,
    CQR,
    LAC,
    RAPS,
    AbsoluteIntervals,
    AdaptiveConformal,
    ConformalSets,
    NormalizedIntervals,
    conformal_quantile,
    conformal_rank,
    set_coverage,
)

N_TEST, N_SPLITS = 500, 200


def _classes(n, seed, classes=5):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    # the model is wrong on purpose: coverage may not lean on calibration
    y = torch.multinomial((0.7 * z).softmax(1), 1, generator=generator).squeeze(1)
    return (2 * z).softmax(1), y, torch.rand(n, generator=generator, dtype=torch.float64)


def _covered_counts_are_beta_binomial(counts, n, alpha):
    """Exact law for continuous scores: each split covers BetaBinomial(tests, k, n + 1 - k) rows."""
    k = conformal_rank(n, alpha)
    if k > n:
        assert (np.array(counts) == N_TEST).all()
        return
    law = stats.betabinom(N_TEST, k, n + 1 - k)
    # the mean of 200 splits within five of its exact standard deviations
    error = law.std() / math.sqrt(len(counts))
    assert abs(np.mean(counts) - law.mean()) < 5 * error
    # and no split where the exact law says fewer than one in a million
    assert min(counts) >= law.ppf(1e-6) and max(counts) <= law.ppf(1 - 1e-6)


@pytest.mark.parametrize("n", [20, 100, 1000])
@pytest.mark.parametrize("score", [LAC(), APS(randomized=True), RAPS(0.05, 2, randomized=True)])
def test_set_coverage_has_its_exact_law(n, score):
    counts = []
    for split in range(N_SPLITS):
        probs, y, u = _classes(n + N_TEST, split)
        sets = ConformalSets(0.1, score).fit(probs[:n], y[:n], u[:n])
        counts.append(int(set_coverage(sets(probs[n:], u[n:]), y[n:]).sum()))
    _covered_counts_are_beta_binomial(counts, n, 0.1)


def test_the_least_likely_class_has_a_score_of_exactly_one():
    """Where a threshold is 1 the class is in every set, and not in some by the rounding of their sums."""
    probs = (3 * torch.randn(500, 7)).softmax(1)
    assert bool((APS()(probs.double()).amax(1) == 1).all())
    y = probs.argmin(1)
    assert bool(ConformalSets(0.1, APS()).fit(probs, y)(probs).all())


@pytest.mark.parametrize("score", [APS(), RAPS(0.05, 2)])
def test_without_randomization_coverage_is_at_least_that(score):
    for n in (20, 100):
        covered = []
        for split in range(N_SPLITS):
            probs, y, _ = _classes(n + N_TEST, split)
            sets = ConformalSets(0.1, score).fit(probs[:n], y[:n])
            covered.append(float(set_coverage(sets(probs[n:]), y[n:]).mean()))
        # torch-uncertainty reaches 0.869 at n = 20
        assert np.mean(covered) >= 0.9 - 3 * np.std(covered) / math.sqrt(N_SPLITS)


@pytest.mark.parametrize("n", [20, 100, 1000])
def test_interval_coverage_has_its_exact_law(n):
    counts = {"absolute": [], "normalized": [], "cqr": []}
    for split in range(N_SPLITS):
        generator = torch.Generator().manual_seed(split)
        x, e = torch.randn(2, n + N_TEST, generator=generator, dtype=torch.float64)
        y, mean, std = x**2 + e * (0.5 + x.abs()), 0.8 * x**2, 0.3 + x.abs()
        a = AbsoluteIntervals(0.1).fit(mean[:n], y[:n])(mean[n:])
        b = NormalizedIntervals(0.1).fit(mean[:n], std[:n], y[:n])(mean[n:], std[n:])
        c = CQR(0.1).fit(mean[:n] - std[:n], mean[:n] + std[:n], y[:n])(mean[n:] - std[n:], mean[n:] + std[n:])
        for name, bounds in zip(counts, (a, b, c), strict=True):
            counts[name].append(int(metrics.covered(*bounds, y[n:]).sum()))
    for found in counts.values():
        _covered_counts_are_beta_binomial(found, n, 0.1)


def test_class_conditional_coverage_holds_class_by_class():
    rare = {k: [] for k in range(3)}
    for split in range(N_SPLITS):
        generator = torch.Generator().manual_seed(split)
        y = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 1200, True, generator=generator)
        z = torch.randn(1200, 3, generator=generator) + 2 * torch.eye(3)[y]
        # a model that neglects the rare class
        probs = (z + torch.tensor([3.0, 0.0, -3.0])).softmax(1).double()
        probs = probs / probs.sum(1, keepdim=True)
        sets = ConformalSets(0.1, per_class=True).fit(probs[:600], y[:600])(probs[600:])
        for k in range(3):
            rare[k].append(float(set_coverage(sets, y[600:])[y[600:] == k].mean()))
    for k in range(3):
        assert np.mean(rare[k]) >= 0.9 - 4 * np.std(rare[k]) / math.sqrt(N_SPLITS)
        assert np.mean(rare[k]) <= 0.93


def test_real_networks_are_covered(data_dir):
    arrays = np.load(data_dir / "cifar_probs" / "cifar10_test_probs.npz")
    y = torch.from_numpy(arrays["y"].astype(np.int64))
    probs = torch.from_numpy(arrays["resnet18"])
    for n in (20, 100, 1000):
        covered = []
        for split in range(N_SPLITS):
            order = torch.randperm(10_000, generator=torch.Generator().manual_seed(split))
            fit, new = order[:n], order[n : n + N_TEST]
            sets = ConformalSets(0.1).fit(probs[fit], y[fit])
            covered.append(int(set_coverage(sets(probs[new]), y[new]).sum()))
        _covered_counts_are_beta_binomial(covered, n, 0.1)


@pytest.mark.parametrize(
    "n, alpha, rank",
    [(9, 0.1, 9), (19, 0.1, 18), (20, 0.1, 19), (99, 0.05, 95), (9, 0.7, 3), (0, 0.1, 1), (8, 0.1, 9)],
)
def test_rank_is_exact(n, alpha, rank):
    assert conformal_rank(n, alpha) == rank


def test_too_few_rows_give_everything():
    probs, y, _ = _classes(8, 0)
    assert bool(ConformalSets(0.1).fit(probs, y)(probs).all())
    probs, y, _ = _classes(9, 0)
    assert not bool(ConformalSets(0.1).fit(probs, y)(probs).all())
    assert conformal_quantile(torch.zeros(0), 0.5).item() == math.inf
    lower, upper = AbsoluteIntervals(0.1).fit(torch.zeros(8), torch.ones(8))(torch.zeros(2))
    assert lower.tolist() == [-math.inf] * 2 and upper.tolist() == [math.inf] * 2


def test_a_class_without_rows_is_in_every_set():
    probs, y, _ = _classes(400, 0)
    keep = y != 2
    sets = ConformalSets(0.1, per_class=True).fit(probs[keep], y[keep])
    assert bool(sets(probs)[:, 2].all())
    assert sets.thresholds is not None and sets.thresholds[2] == math.inf


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 10_000))
def test_scores_are_the_definitions(n, classes, seed):
    rng = np.random.default_rng(seed)
    probs = rng.integers(1, 5, (n, classes)).astype(float)
    probs /= probs.sum(1, keepdims=True)
    aps, raps = APS()(torch.from_numpy(probs)), RAPS(0.1, 2)(torch.from_numpy(probs))
    for i in range(n):
        order = sorted(range(classes), key=lambda k: (-probs[i, k], k))
        for rank, k in enumerate(order, start=1):
            mass = sum(probs[i, j] for j in order[:rank])
            assert float(aps[i, k]) == pytest.approx(mass, rel=1e-12)
            assert float(raps[i, k]) == pytest.approx(mass + 0.1 * max(0, rank - 2), rel=1e-12)
    np.testing.assert_allclose(LAC()(torch.from_numpy(probs)), 1 - probs)


def test_never_empty_adds_the_top_class_only():
    probs = torch.tensor([[0.34, 0.33, 0.33], [0.9, 0.05, 0.05]])
    sets = ConformalSets(0.5, never_empty=True).fit(
        torch.tensor([[0.9, 0.05, 0.05]] * 5), torch.zeros(5, dtype=torch.int64)
    )
    assert sets(probs).tolist() == [[True, False, False], [True, False, False]]
    sets.never_empty = False
    assert sets(probs).tolist() == [[False, False, False], [True, False, False]]


def test_a_calibration_row_is_in_its_own_set_at_the_threshold():
    # the same arithmetic in fit and forward, or ties fall out by one rounding
    probs, y, _ = _classes(19, 3)
    for score in (LAC(), APS(), RAPS()):
        for p in (probs, probs.float()):
            inside = set_coverage(ConformalSets(0.1, score).fit(p, y)(p), y)
            assert int(inside.sum()) >= 18


def test_bad_inputs():
    probs, y, u = _classes(30, 0)
    with pytest.raises(ValueError, match="alpha"):
        ConformalSets(1.0)
    with pytest.raises(ValueError, match="needs u"):
        ConformalSets(0.1, APS(randomized=True)).fit(probs, y)
    with pytest.raises(ValueError, match="u must be"):
        ConformalSets(0.1, APS(randomized=True)).fit(probs, y, u[:-1])
    with pytest.raises(RuntimeError, match="fit first"):
        ConformalSets(0.1)(probs)
    with pytest.raises(ValueError, match="positive"):
        NormalizedIntervals(0.1).fit(torch.zeros(3), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="same shape"):
        AbsoluteIntervals(0.1).fit(torch.zeros(3, 1), torch.zeros(3))


def test_outputs_have_their_own_widths():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(999, 2, generator=generator) * torch.tensor([1.0, 10.0])
    intervals = AbsoluteIntervals(0.1).fit(torch.zeros_like(y), y)
    lower, upper = intervals(torch.zeros(1, 2))
    ratio = float(upper[0, 1] / upper[0, 0])
    assert ratio == pytest.approx(10, rel=0.15)
    assert upper.shape == lower.shape == (1, 2)


def test_cqr_shrinks_what_is_too_wide_and_never_crosses():
    y = torch.linspace(-1, 1, 99)
    wide = CQR(0.1).fit(torch.full((99,), -5.0), torch.full((99,), 5.0), y)
    lower, upper = wide(torch.tensor([-5.0]), torch.tensor([5.0]))
    assert float(upper) < 1.0 and float(lower) > -1.0
    lower, upper = wide(torch.tensor([0.0]), torch.tensor([2.0]))
    assert float(lower) == float(upper) == 1.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.05, 0.1, 0.3]),
    st.sampled_from([0.01, 0.05, 0.2]),
    st.integers(1, 400),
)
def test_adaptive_conformal_keeps_its_bound_on_any_stream(seed, alpha, step, length):
    rng = np.random.default_rng(seed)
    stream = AdaptiveConformal(alpha, step, window=50)
    for t in range(length):
        # an adversary: jumps in scale, drift, and now and then just above the threshold
        threshold = stream.threshold()
        if rng.random() < 0.3 and math.isfinite(threshold):
            score = threshold + 1e-9
        else:
            score = rng.exponential() * 10.0 ** rng.integers(-2, 3) + t
        stream.update(score)
    bound = (max(alpha, 1 - alpha) + step) / (step * length)
    assert abs(stream.misses / stream.n - alpha) <= bound + 1e-12


def test_adaptive_conformal_recovers_from_a_shift():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.exponential(1, 2000), rng.exponential(4, 4000)])
    adaptive = AdaptiveConformal(0.1, 0.02, window=500)
    inside = np.array([adaptive.update(s) for s in scores])
    fixed = float(conformal_quantile(torch.from_numpy(scores[:2000]), 0.1))
    assert (scores[3000:] <= fixed).mean() < 0.6
    assert abs(inside[3000:].mean() - 0.9) < 0.01


def test_adaptive_conformal_resumes():
    rng = np.random.default_rng(1)
    scores = rng.exponential(1, 300)
    whole, half = AdaptiveConformal(0.1), AdaptiveConformal(0.1)
    for s in scores:
        whole.update(s)
    for s in scores[:100]:
        half.update(s)
    resumed = AdaptiveConformal(0.1).load(half.state())
    for s in scores[100:]:
        resumed.update(s)
    assert resumed.state() == whole.state()
    with pytest.raises(ValueError, match="finite"):
        whole.update(math.nan)
    assert resumed.state() == whole.state()
