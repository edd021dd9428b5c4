import numpy as np
import pytest
import torch

from vbdl import metrics


def _random(n, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(n, classes, generator=generator, dtype=torch.float64).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


def _reference(probs, y, nu):
    residual = np.eye(probs.shape[1])[y] - probs
    distance = 0.5 * np.abs(probs[:, None] - probs[None]).sum(2)
    h = np.exp(-distance / nu) * (residual @ residual.T)
    n = len(y)
    pairs = [h[2 * i, 2 * i + 1] for i in range(n // 2)]
    return {
        "biased": h.mean(),
        "unbiased": (h.sum() - np.trace(h)) / (n * (n - 1)),
        "linear": np.mean(pairs),
    }


@pytest.mark.parametrize("n", [2, 3, 50, 1500])
def test_three_estimators_equal_the_double_loop(n):
    probs, y = _random(n)
    for estimator, expected in _reference(probs.numpy(), y.numpy(), 0.3).items():
        assert metrics.skce(probs, y, estimator, 0.3) == pytest.approx(expected, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("n", [2, 3, 4, 101, 1200])
def test_median_distance_is_exact(n):
    probs, _ = _random(n)
    row, column = np.triu_indices(n, 1)
    p = probs.numpy()
    expected = np.median(0.5 * np.abs(p[row] - p[column]).sum(1))
    assert metrics.median_distance(probs) == pytest.approx(expected, rel=1e-14)


def test_median_of_mostly_equal_distances():
    corner = torch.eye(3, dtype=torch.float64)[[0] * 5 + [1] * 5]
    assert metrics.median_distance(corner) == 1.0


def test_one_row_and_equal_rows_are_refused():
    probs, y = _random(3)
    with pytest.raises(ValueError, match="two rows"):
        metrics.skce(probs[:1], y[:1])
    with pytest.raises(ValueError, match="bandwidth"):
        metrics.skce(probs[:1].expand(3, -1), y)
    with pytest.raises(ValueError, match="estimator"):
        metrics.skce(probs, y, "other")
