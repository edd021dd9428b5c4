"""Proper scores against closed forms, quadrature and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.metrics import brier_score_loss, log_loss

from vbdl import metrics


def _probs(n, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(n, classes, generator=generator, dtype=torch.float64).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def _mixture(samples=5, batch=7, outputs=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(samples, batch, outputs, generator=generator, dtype=torch.float64) * 3
    stds = torch.rand(samples, batch, outputs, generator=generator, dtype=torch.float64) + 0.1
    return means, stds, torch.randn(batch, outputs, generator=generator, dtype=torch.float64) * 3


def test_categorical_nll_and_brier_equal_sklearn():
    probs, y = _probs(500)
    expected = log_loss(y.numpy(), probs.numpy(), labels=range(4))
    assert float(metrics.categorical_nll(probs, y).mean()) == pytest.approx(expected, rel=1e-12)
    p = probs[:, 0] / (probs[:, 0] + probs[:, 1])
    label = (y % 2).long()
    # ours sums over both classes
    binary = 2 * brier_score_loss(label.numpy(), p.numpy())
    assert float(metrics.brier_score(p, label).mean()) == pytest.approx(binary, rel=1e-12)


def test_an_excluded_truth_scores_infinity():
    probs = torch.tensor([[1.0, 0.0]])
    assert metrics.categorical_nll(probs, torch.tensor([1])).tolist() == [math.inf]
    assert metrics.categorical_nll(probs, torch.tensor([0])).tolist() == [0.0]


@pytest.mark.parametrize("n_bins", [1, 10, 50])
def test_brier_decomposition_is_exact(n_bins):
    probs, y = _probs(700)
    parts = metrics.brier_decomposition(probs, y, n_bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    assert total == pytest.approx(parts.brier, rel=1e-12)
    expected = float(metrics.brier_score(probs, y).mean())
    assert parts.brier == pytest.approx(expected, rel=1e-12)


def test_brier_decomposition_is_murphys_for_one_value_a_bin():
    p = torch.tensor([0.25] * 4 + [0.75] * 4, dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
    parts = metrics.brier_decomposition(p, y, 2)
    # calibrated: reliability 0; both classes count
    assert parts.reliability == pytest.approx(0, abs=1e-15)
    assert parts.within_bin == pytest.approx(0, abs=1e-15)
    assert parts.resolution == pytest.approx(2 * 0.25**2, rel=1e-14)
    assert parts.uncertainty == pytest.approx(2 * 0.25, rel=1e-14)


def test_brier_decomposition_merges():
    probs, y = _probs(300)
    a, b = metrics.BrierDecomposition(), metrics.BrierDecomposition()
    a.update(probs[:100], y[:100])
    b.update(probs[100:], y[100:])
    merged, whole = metrics.BrierDecomposition().merge(a).merge(b).compute(), None
    whole = metrics.brier_decomposition(probs, y)
    for name, value in vars(whole).items():
        assert getattr(merged, name) == pytest.approx(value, rel=1e-12, abs=1e-15)


def test_gaussian_nll_is_scipys_and_sums_over_outputs():
    means, stds, y = _mixture(samples=1)
    expected = -stats.norm.logpdf(y.numpy(), means[0].numpy(), stds[0].numpy()).sum(1)
    np.testing.assert_allclose(metrics.gaussian_nll(means[0], stds[0], y), expected, rtol=1e-12)


def test_mixture_nll_is_the_joint_density():
    means, stds, y = _mixture()
    density = stats.norm.pdf(y.numpy(), means.numpy(), stds.numpy()).prod(axis=2)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    np.testing.assert_allclose(metrics.mixture_nll(means, stds, y), -np.log(density.mean(0)), rtol=1e-10)
    np.testing.assert_allclose(
        metrics.mixture_nll(means, stds, y, weights), -np.log(weights.numpy() @ density), rtol=1e-10
    )
    alone = metrics.mixture_nll(means[:1], stds[:1], y)
    np.testing.assert_allclose(alone, metrics.gaussian_nll(means[0], stds[0], y), rtol=1e-12)


def test_two_far_members_are_not_one_narrow_gaussian():
    # averaging (mean, std) of members at -5 and +5 would give std 0.1 at 0: nll(5) of 1250 nats
    means = torch.tensor([[-5.0], [5.0]])
    nll = metrics.mixture_nll(means, torch.full((2, 1), 0.1), torch.tensor([5.0]))
    assert float(nll) == pytest.approx(math.log(2) + math.log(0.1 * math.sqrt(2 * math.pi)), abs=1e-6)


def _crps_by_quadrature(cdf, y, low, high):
    below = integrate.quad(lambda t: cdf(t) ** 2, low, y, epsabs=1e-12, limit=400)[0]
    above = integrate.quad(lambda t: (1 - cdf(t)) ** 2, y, high, epsabs=1e-12, limit=400)[0]
    return below + above


def test_crps_of_gaussian_and_mixture_is_the_integral():
    means, stds, y = _mixture(batch=4, outputs=1)
    mixture = metrics.crps_mixture(means, stds, y)
    single = metrics.crps_gaussian(means[0], stds[0], y)
    for i in range(4):
        m, s = means[:, i, 0].numpy(), stds[:, i, 0].numpy()
        target = float(y[i, 0])
        expected = _crps_by_quadrature(lambda t, m=m, s=s: stats.norm.cdf(t, m, s).mean(), target, -25, 25)
        assert float(mixture[i, 0]) == pytest.approx(expected, abs=1e-8)
        expected = _crps_by_quadrature(lambda t, m=m, s=s: stats.norm.cdf(t, m[0], s[0]), target, -25, 25)
        assert float(single[i, 0]) == pytest.approx(expected, abs=1e-8)


def test_crps_limits():
    means, stds, y = _mixture()
    np.testing.assert_allclose(
        metrics.crps_mixture(means[:1], stds[:1], y),
        metrics.crps_gaussian(means[0], stds[0], y),
        rtol=1e-12,
    )
    # point masses: the mixture is the empirical distribution of its means
    np.testing.assert_allclose(
        metrics.crps_mixture(means, torch.zeros_like(stds), y),
        metrics.crps_samples(means, y),
        rtol=1e-10,
    )
    np.testing.assert_allclose(metrics.crps_samples(means[:1], y), (means[0] - y).abs(), rtol=1e-12)


def test_crps_of_samples_is_the_double_sum():
    means, _, y = _mixture(samples=6)
    x = means.numpy()
    first = np.abs(x - y.numpy()).mean(0)
    pairs = np.abs(x[:, None] - x[None]).sum((0, 1))
    np.testing.assert_allclose(metrics.crps_samples(means, y), first - pairs / 72, rtol=1e-10)
    np.testing.assert_allclose(metrics.crps_samples(means, y, fair=True), first - pairs / 60, rtol=1e-10)


def test_energy_score_is_the_double_sum_and_crps_in_one_dimension():
    means, _, y = _mixture(samples=6, outputs=3)
    x, target = means.numpy(), y.numpy()
    first = np.linalg.norm(x - target, axis=2).mean(0)
    pairs = np.linalg.norm(x[:, None] - x[None], axis=3).sum((0, 1))
    np.testing.assert_allclose(metrics.energy_score(means, y), first - pairs / 72, rtol=1e-10)
    np.testing.assert_allclose(
        metrics.energy_score(means[..., :1], y[:, :1], fair=True),
        metrics.crps_samples(means[..., 0], y[:, 0], fair=True),
        rtol=1e-10,
    )
    with pytest.raises(ValueError, match="two samples"):
        metrics.energy_score(means[:1], y, fair=True)


def test_large_offset_in_float32_stays_exact():
    # E[x²] - E[x]² at mean 1000 in float32 is noise elsewhere
    means = torch.tensor([[1000.0], [1000.5]])
    value = metrics.crps_samples(means, torch.tensor([1000.25]))
    assert float(value) == pytest.approx(0.25 - 0.125, abs=1e-9)


@pytest.mark.parametrize("score", [metrics.categorical_nll, metrics.brier_score, metrics.correct, metrics.ece])
def test_bad_probabilities_are_named(score):
    probs, y = _probs(3, 3)
    nan = probs.clone()
    nan[1, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite value in row 1"):
        score(nan, y)
    with pytest.raises(ValueError, match="row 0 of probs sums to"):
        score(probs * torch.tensor([0.9, 1, 1])[:, None], y)
    with pytest.raises(ValueError, match="outside .* row 2"):
        score(probs + torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, -1, 1]]), y)
    with pytest.raises(ValueError, match="outside the 3 classes"):
        score(probs, torch.tensor([0, 1, 3]))
    with pytest.raises(TypeError, match="integer dtype"):
        score(probs, y.double())
    with pytest.raises(ValueError, match="one label per row"):
        score(probs, y[:2])
    with pytest.raises(ValueError, match=r"\(batch, 1\)"):
        score(probs[:, :1], y)
    with pytest.raises(TypeError, match="floating point"):
        score(torch.tensor([[1, 0]]), y[:1])


def test_no_rows():
    empty, none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert metrics.brier_score(empty, none).shape == (0,)
    for metric in (metrics.ece, metrics.accuracy, metrics.mce, metrics.classwise_ece):
        with pytest.raises(ValueError, match="no rows"):
            metric(empty, none)


def test_broadcasting_targets_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        metrics.rmse(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match="positive"):
        metrics.gaussian_nll(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.zeros(2))


def test_low_precision_softmax_is_accepted_and_layout_does_not_matter():
    probs, y = _probs(200, 10)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = probs.to(dtype)
        a = metrics.brier_score(low, y)
        exact = ((low.double() - torch.eye(10)[y]) ** 2).sum(1)
        np.testing.assert_allclose(a, exact, rtol=1e-14)
        np.testing.assert_allclose(a, metrics.brier_score(low.T.contiguous().T, y), rtol=1e-14)
        assert metrics.ece(low, y) == metrics.ece(low.T.contiguous().T, y)


def test_accuracy_and_rmse():
    probs, y = _probs(100)
    expected = float((probs.argmax(1) == y).double().mean())
    assert metrics.accuracy(probs, y) == pytest.approx(expected, abs=1e-15)
    interval = metrics.accuracy_interval(probs, y)
    k = round(expected * 100)
    exact = stats.binomtest(k, 100).proportion_ci(0.95, method="exact")
    assert (interval.lower, interval.upper) == pytest.approx((exact.low, exact.high), rel=1e-10)
    assert metrics.rmse(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]])) == math.sqrt(2.5)
