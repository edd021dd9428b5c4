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
        center = means.mean(0)
        m, s = (center + scale * (means - center)).numpy(), (scale * stds).numpy()
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


def _cdf_by_name(name, n, seed):
    """Normal scores of y under a predictive that is wrong in this way."""
    rng = np.random.default_rng(seed)
    z = {
        "calibrated": lambda: rng.normal(size=n),
        "too narrow": lambda: 3 * rng.normal(size=n),
        "too wide": lambda: 0.3 * rng.normal(size=n),
        "shifted": lambda: rng.normal(size=n) + 1,
        "heavy tails": lambda: rng.standard_t(3, size=n),
        "skewed": lambda: rng.gamma(2, size=n) - 2,
        "two modes": lambda: rng.choice([-1.0, 1.0], n) + 0.3 * rng.normal(size=n),
    }[name]()
    return torch.from_numpy(z)


# nats a row that a map of the true distribution gains: E log p(z) - log N(z), by a histogram of a million
_GAINS = {"too narrow": 2.90, "too wide": 0.754, "shifted": 0.5, "heavy tails": 0.56, "skewed": 0.33, "two modes": 0.53}


@pytest.mark.parametrize("n", [50, 500, 20_000])
def test_cdf_density_of_a_calibrated_predictive_stays(n):
    """The spacings of the empirical distribution lose 0.42 nats a row, at any n."""
    v = torch.rand(100_000, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    changes = []
    for seed in range(20):
        u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        changes.append(float(CDFRecalibration().fit(u).slope(v).log().mean()))
    # in expectation a parameter costs half a nat over n; most often there is none
    assert np.mean(changes) > -1 / n and min(changes) > -6 / n
    assert np.median(changes) == 0


@pytest.mark.parametrize("name", _GAINS)
def test_cdf_density_converges(name):
    new = _cdf_by_name(name, 100_000, 1000)
    gained = {
        n: float(CDFRecalibration().fit_scores(_cdf_by_name(name, n, 1)).log_slope(new).mean()) for n in (500, 20_000)
    }
    assert gained[20_000] > 0.97 * _GAINS[name] - 0.005, gained
    assert gained[500] > 0.75 * _GAINS[name], gained


@pytest.mark.parametrize("n", [1, 2, 7, 30, 300, 5000])
@pytest.mark.parametrize("name", ["calibrated", *_GAINS, "ties", "one value", "ends"])
def test_cdf_map_inverse_and_slope_are_of_one_curve(name, n):
    if name in ("ties", "one value", "ends"):
        z = _cdf_by_name("calibrated", n, 0)
        u = {
            "ties": torch.special.ndtr((3 * z).round() / 3),
            "one value": torch.full((n,), 0.8, dtype=torch.float64),
            "ends": torch.special.ndtr(4 * z).round(),
        }[name]
    else:
        u = torch.special.ndtr(_cdf_by_name(name, n, 0))
    recalibration = CDFRecalibration().fit(u)
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)
    value = recalibration(grid)
    assert value[0] == 0 and value[-1] == 1 and bool((value.diff() >= 0).all())
    level = recalibration.level(grid)
    told = level < 1 - 1e-6  # nearer to 1 a level has no digits left: scores below have
    np.testing.assert_allclose(recalibration(level)[told], grid[told], atol=1e-7)
    at, h = torch.linspace(0.02, 0.98, 97, dtype=torch.float64), 1e-6
    numeric = (recalibration(at + h) - recalibration(at - h)) / (2 * h)
    np.testing.assert_allclose(recalibration.slope(at), numeric, rtol=1e-3, atol=1e-8)
    assert bool((recalibration.slope(at) >= 0).all())
    # and all of it on the scale of scores, far into both tails
    scores = torch.linspace(-30, 30, 121, dtype=torch.float64)
    assert bool((recalibration.score(scores).diff() > 0).all())
    np.testing.assert_allclose(recalibration.inverse(recalibration.score(scores)), scores, atol=1e-8)
    assert bool(recalibration.log_slope(scores).isfinite().all())


def test_cdf_with_one_value_centers_it():
    for n in (1, 50, 500):
        assert float(CDFRecalibration().fit(torch.full((n,), 0.2))(torch.tensor(0.2))) == pytest.approx(0.5, abs=1e-6)


def test_cdf_tails_without_rows_are_scaled_as_the_rest():
    """Three times too narrow: a level that no calibration row reached is still the right one."""
    recalibration = CDFRecalibration().fit_scores(_cdf_by_name("too narrow", 2000, 0))
    np.testing.assert_allclose(recalibration.inverse(torch.tensor([-5.0, 5.0])), [-15.0, 15.0], rtol=0.05)
    # a level of float32 that rounds to 1 says no more than that it is beyond what float32 tells apart
    assert 0 < float(recalibration.slope(torch.tensor(1.0))) < math.inf


def test_cdf_of_version_0_1_is_what_it_was():
    """Its buffers are levels and values, linear between them."""
    recalibration = CDFRecalibration()
    recalibration.knots = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    recalibration.values = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    asked = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert recalibration(asked).tolist() == [0.0, 0.2, 0.4, 0.7, 1.0]
    assert recalibration.level(torch.tensor([0.2, 0.7], dtype=torch.float64)).tolist() == [0.25, 0.75]
    assert recalibration.slope(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist() == [0.8, 1.2]
    # fitted again it is a smooth one
    assert recalibration.steps is not None and recalibration.fit(torch.rand(100)).steps is None


def test_cdf_refuses():
    with pytest.raises(ValueError, match="not y"):
        CDFRecalibration().fit(torch.tensor([1.5]))
    with pytest.raises(ValueError, match="no rows"):
        CDFRecalibration().fit(torch.zeros(0))
    for call in ("forward", "level", "slope"):
        with pytest.raises(RuntimeError, match="fit first"):
            getattr(CDFRecalibration(), call)(torch.tensor([0.5]))
