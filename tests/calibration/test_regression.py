import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from vbdl import metrics
from vbdl.calibration import CDFRecalibration, StdScaling


def _gaussian(n=2000, seed=0):
    """Two outputs whose std is predicted 2 and 0.5 times too small."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    std = torch.rand(n, 2, generator=generator, dtype=torch.float64) + 0.5
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return mean, std, mean + std * noise * torch.tensor([2.0, 0.5])


def _mixture(n=800, samples=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(samples, n, 2, generator=generator, dtype=torch.float64)
    stds = torch.rand(samples, n, 2, generator=generator, dtype=torch.float64) * 0.5 + 0.2
    y = torch.randn(n, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 0.7])
    return means, stds, y


def test_gaussian_scale_is_the_minimum_of_the_likelihood():
    mean, std, y = _gaussian()
    scaling = StdScaling().fit(mean, std, y)
    np.testing.assert_allclose(scaling.scale, [2.0, 0.5], rtol=0.05)
    for d in range(2):
        best = optimize.minimize_scalar(
            lambda s, d=d: -stats.norm.logpdf(y[:, d], mean[:, d], math.exp(s) * std[:, d]).mean(),
            bounds=(-3, 3),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert float(scaling.scale[d]) == pytest.approx(math.exp(best.x), rel=1e-6)
    shared = StdScaling(per_output=False).fit(mean, std, y)
    expected = float((((y - mean) / std) ** 2).mean().sqrt())
    assert shared.scale.shape == () and float(shared.scale) == pytest.approx(expected, rel=1e-12)


def test_scaled_gaussian_is_calibrated_on_new_rows():
    scaling = StdScaling().fit(*_gaussian(seed=0))
    mean, std, y = _gaussian(seed=1)
    before = metrics.quantile_calibration_error(metrics.gaussian_cdf(mean, std, y)[:, 0])
    after = metrics.quantile_calibration_error(metrics.gaussian_cdf(*scaling(mean, std), y))
    assert before > 0.08 and after < 0.015


@pytest.mark.parametrize("per_output", [True, False])
def test_mixture_scale_is_the_minimum_of_the_likelihood(per_output):
    means, stds, y = _mixture()
    scaling = StdScaling(per_output).fit(means, stds, y)

    def loss(scale):
        centre = means.mean(0)
        m, s = (centre + scale * (means - centre)).numpy(), (scale * stds).numpy()
        density = stats.norm.pdf(y.numpy(), m, s).mean(0)
        return -np.log(density).mean(0).sum()

    found = scaling.scale.numpy()
    assert found.shape == ((2,) if per_output else ())
    here = loss(torch.from_numpy(np.asarray(found)))
    for d in range(found.size):
        for factor in (0.99, 1.01):
            moved = np.array(found, ndmin=1, copy=True)
            moved[d] *= factor
            assert loss(torch.from_numpy(moved)) > here
    m, s = scaling.mixture(means, stds)
    assert loss(torch.ones(1)) > here
    np.testing.assert_allclose(
        -metrics.mixture_nll(m[..., :1], s[..., :1], y[:, :1]).mean(),
        np.log(stats.norm.pdf(y[:, :1], m[..., :1], s[..., :1]).mean(0)).mean(),
        rtol=1e-10,
    )


def test_a_mixture_of_one_is_the_gaussian():
    mean, std, y = _gaussian()
    a, b = StdScaling().fit(mean, std, y), StdScaling().fit(mean[None], std[None], y)
    np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)


def test_variances_keep_adding_up():
    means, stds, y = _mixture()
    scaling = StdScaling().fit(means, stds, y)
    m, s = scaling.mixture(means, stds)
    aleatoric, epistemic = (stds**2).mean(0), means.var(0, correction=0)
    np.testing.assert_allclose(scaling.variance(aleatoric), (s**2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.variance(epistemic), m.var(0, correction=0), rtol=1e-10)
    np.testing.assert_allclose(m.mean(0), means.mean(0), atol=1e-12)


def test_float32_fit_is_the_float64_fit():
    mean, std, y = _gaussian()
    low = StdScaling().fit(mean.float(), std.float(), y.float())
    np.testing.assert_allclose(low.scale, StdScaling().fit(mean, std, y).scale, rtol=1e-6)
    assert low(mean.float(), std.float())[1].dtype == torch.float32


def test_std_scaling_refuses():
    mean, std, y = _gaussian(5)
    with pytest.raises(ValueError, match="no rows"):
        StdScaling().fit(mean[:0], std[:0], y[:0])
    with pytest.raises(ValueError, match="equals its target"):
        StdScaling().fit(y, std, y)
    with pytest.raises(ValueError, match="positive"):
        StdScaling().fit(mean, 0 * std, y)
    with pytest.raises(ValueError, match="NaN"):
        StdScaling().fit(mean * math.nan, std, y)


def test_cdf_recalibration_makes_any_shape_uniform():
    rng = np.random.default_rng(0)
    # a skewed truth under a Gaussian predictive
    y = torch.from_numpy(rng.gamma(2.0, 1.0, 4000))
    u = metrics.gaussian_cdf(torch.full_like(y, 2.0), torch.full_like(y, 1.0), y)
    recalibration = CDFRecalibration().fit(u[:2000])
    before = metrics.quantile_calibration_error(u[2000:])
    after = metrics.quantile_calibration_error(recalibration(u[2000:]))
    assert before > 0.05 and after < 0.02
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert bool((recalibration(grid).diff() >= 0).all())
    assert recalibration(grid)[0] == 0 and recalibration(grid)[-1] == 1
    # quantiles of the recalibrated predictive cover what they say
    for q in (0.05, 0.5, 0.95):
        level = recalibration.level(torch.tensor(q, dtype=torch.float64))
        asked = 2.0 + float(torch.special.ndtri(level))
        assert float((y[2000:] <= asked).double().mean()) == pytest.approx(q, abs=0.02)


def test_cdf_level_is_the_inverse():
    u = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    recalibration = CDFRecalibration().fit(u)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    np.testing.assert_allclose(recalibration(recalibration.level(grid)), grid, atol=1e-12)


def test_cdf_by_hand_with_ties_and_ends():
    recalibration = CDFRecalibration().fit(torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=torch.float64))
    # three ties: ranks 1..3 of n + 1 = 5, the middle is 2/5; an exact 1 is the end itself
    asked = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(recalibration(asked), [0, 0.2, 0.4, 0.7, 1.0], rtol=1e-12)
    one = CDFRecalibration().fit(torch.tensor([0.2]))
    assert float(one(torch.tensor(0.2, dtype=torch.float64))) == pytest.approx(0.5, abs=1e-7)
    with pytest.raises(ValueError, match="not y"):
        CDFRecalibration().fit(torch.tensor([1.5]))
    with pytest.raises(ValueError, match="no rows"):
        CDFRecalibration().fit(torch.zeros(0))
