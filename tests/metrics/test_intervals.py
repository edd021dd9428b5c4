import math

import numpy as np
import pytest
import torch
from scipy import stats

from vbdl import metrics


def test_interval_score_by_hand():
    lower, upper = torch.zeros(3), torch.full((3,), 2.0)
    y = torch.tensor([1.0, -0.5, 3.0])
    score = metrics.interval_score(lower, upper, y, 0.1)
    np.testing.assert_allclose(score, [2.0, 2 + 20 * 0.5, 2 + 20 * 1.0], rtol=1e-14)
    assert metrics.interval_coverage(lower, upper, y) == pytest.approx(1 / 3)
    assert metrics.interval_width(lower, upper) == 2.0


def test_interval_score_is_least_at_the_true_quantiles():
    y = torch.from_numpy(stats.norm.ppf((np.arange(4000) + 0.5) / 4000))
    scores = {
        z: float(metrics.interval_score(torch.full_like(y, -z), torch.full_like(y, z), y, 0.1).mean())
        for z in (1.4, 1.6448536, 1.9)
    }
    assert min(scores, key=scores.get) == 1.6448536


def test_infinite_intervals_cover_and_have_infinite_width():
    infinite = torch.full((2,), math.inf)
    y = torch.zeros(2)
    assert metrics.interval_coverage(-infinite, infinite, y) == 1.0
    assert metrics.interval_width(-infinite, infinite) == math.inf
    assert metrics.interval_score(-infinite, infinite, y, 0.1).tolist() == [math.inf] * 2


def test_bad_intervals_are_named():
    y = torch.zeros(2)
    with pytest.raises(ValueError, match="above upper in row 1"):
        metrics.covered(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5]), y)
    with pytest.raises(ValueError, match="NaN"):
        metrics.covered(torch.tensor([0.0, math.nan]), torch.ones(2), y)
    with pytest.raises(ValueError, match="lower is"):
        metrics.covered(torch.zeros(2, 1), torch.ones(2, 1), y)


def test_cdfs_are_scipys():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 6, 2, generator=generator, dtype=torch.float64)
    stds = torch.rand(4, 6, 2, generator=generator, dtype=torch.float64) + 0.2
    y = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    expected = stats.norm.cdf(y.numpy(), means.numpy(), stds.numpy())
    np.testing.assert_allclose(metrics.gaussian_cdf(means[0], stds[0], y), expected[0], rtol=1e-12)
    np.testing.assert_allclose(metrics.mixture_cdf(means, stds, y), expected.mean(0), rtol=1e-12)
    tail = metrics.gaussian_cdf(torch.zeros(1), torch.ones(1), torch.tensor([-30.0]))
    assert float(tail) == pytest.approx(stats.norm.cdf(-30.0), rel=1e-12)
    # a mixture of one constant: the probability must not pass one by rounding
    one = metrics.mixture_cdf(torch.zeros(3, 1), torch.full((3, 1), 1e-9), torch.ones(1))
    assert float(one) == 1.0


def test_quantile_calibration():
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert metrics.quantile_calibration_error(uniform) < 1e-3
    # all mass at the center: the frequency is 0 below and 1 above; mean |step - p| = 1/4
    center = torch.full((10,), 0.5, dtype=torch.float64)
    assert metrics.quantile_calibration_error(center, 999) == pytest.approx(0.25, abs=1e-3)
    # the very level counts as reached
    exact = metrics.QuantileCalibration(1)
    exact.update(torch.tensor([0.5, 0.50001]))
    assert exact.frequencies().tolist() == [0.5]
    third = metrics.QuantileCalibration(1)
    third.update(torch.tensor([0.1, 0.7, 0.8]))
    assert float(third.frequencies()) == 1 / 3


def test_quantile_calibration_merges():
    x = torch.rand(500, generator=torch.Generator().manual_seed(0))
    a, b = metrics.QuantileCalibration(9), metrics.QuantileCalibration(9)
    a.update(x[:100])
    b.update(x[100:])
    assert a.merge(b).compute() == metrics.quantile_calibration_error(x, 9)
    with pytest.raises(ValueError, match="not y"):
        a.update(torch.tensor([1.5]))
    a.reset()
    with pytest.raises(ValueError, match="no rows yet"):
        a.compute()


def test_sharpness_is_the_root_mean_variance():
    assert metrics.sharpness(torch.tensor([3.0, 4.0])) == pytest.approx(math.sqrt(12.5))
