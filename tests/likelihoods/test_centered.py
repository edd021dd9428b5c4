"""Targets far from zero: whatever is true of y is true of y + 1.7e9."""

import functools

import numpy as np
import pytest
import torch

import vbdl
from vbdl.batch.output import fields
from vbdl.calibration import CQR, AbsoluteIntervals, CDFRecalibration, NormalizedIntervals, StdScaling
from vbdl.likelihoods.centered import Centered
from vbdl.tabular import TableOptions, fit_table

FAST = {"n_members": 2, "width": 16, "epochs": 8, "lr": 1e-2, "n_samples": 8}
X = np.random.default_rng(0).normal(size=500)
# in steps of 1/64, which float64 holds exactly beside any of the offsets
Y = np.round(64 * (5 * X + np.random.default_rng(1).normal(size=500))) / 64
OFFSETS = [2_460_000.0, 5_700_000.0, -1.7e9, 1e12]  # Julian days, meters north, seconds, milliseconds


@functools.cache  # what is fitted is read and not changed
def _fitted(offset, method="deep-ensemble", noise=None):
    settings = TableOptions(method=method, noise=noise, **FAST)
    return fit_table({"x": X, "y": offset + Y}, "y", settings, progress=False)


# constant noise far from zero is tried with the estimator, below
@pytest.mark.parametrize("noise", [pytest.param("constant", marks=pytest.mark.slow), "per-row"])
@pytest.mark.parametrize(
    "method", ["deep-ensemble", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mc-dropout", "mean-field"))]
)
def test_a_table_far_from_zero_is_a_table_near_it(method, noise):
    near = _fitted(0.0, method, noise)
    x = near.schema.tensor({"x": X[:20]})
    a = near.predictor(x, samples=True)
    for offset in OFFSETS:
        far = _fitted(offset, method, noise)
        b = far.predictor(x, samples=True)
        assert b.mean.dtype == torch.float64 and torch.allclose(b.total, a.total, rtol=1e-3)
        for one, other in (
            (a.mean, b.mean), (a.lower, b.lower), (a.upper, b.upper), (a.quantile(0.2), b.quantile(0.2)),
            (a.interval(0.8)[1], b.interval(0.8)[1]),
        ):  # fmt: skip
            assert torch.allclose(one.double(), other - offset, atol=0.01)
        y = torch.from_numpy(Y[:20])[:, None]
        assert torch.allclose(a.cdf(y).double(), b.cdf(y + offset), atol=2e-3)
        assert torch.allclose(a.log_prob(y).double(), b.log_prob(y + offset), atol=0.02)
        for score in near.evaluation.scores:
            assert far.evaluation[score.name].value == pytest.approx(score.value, rel=0.02, abs=0.02)


@pytest.mark.parametrize(
    "make",
    [StdScaling, CDFRecalibration, lambda: AbsoluteIntervals(0.2), lambda: NormalizedIntervals(0.2), lambda: CQR(0.2)],
)
def test_every_calibration_of_a_regression_holds_behind_it(make):
    found = [_fitted(offset) for offset in (0.0, 1.7e9)]
    predictions = []
    for offset, f in zip((0.0, 1.7e9), found, strict=True):
        start, (x, y) = f.predictor, f.test
        while hasattr(start.likelihood, "method"):
            start = start.replace(likelihood=start.likelihood.likelihood)
        p = vbdl.calibrate(start, (x, y), make())(x, samples=True)
        truth = y.double()
        predictions.append(
            [p.quantile(0.1) - offset, p.cdf(truth), p.std]
            + ([p.lower - offset, p.upper - offset] if p.lower is not None else [])
        )
    for one, other in zip(*predictions, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=0.02)


def test_it_is_saved_loaded_and_written_in_float64(tmp_path):
    f = _fitted(1.7e9)
    f.save(tmp_path / "m")
    loaded = vbdl.load(tmp_path / "m", compile=False)
    x = f.schema.tensor({"x": X[:70]})
    a, b = f.predictor(x, samples=True), loaded(x, samples=True)
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("mean", "total", "lower", "upper", "samples"))
    table = vbdl.predict_table(tmp_path / "m", {"x": X[:70]}, compile=False, progress=False)
    assert np.abs(np.array(table["mean"]) - a.mean.flatten().numpy()).max() < 1e-3
    assert np.abs(np.array(table["upper"]) - a.upper.flatten().numpy()).max() < 1e-3
    written = fields(a, None, ("mean", "std"), 0)
    assert str(written["mean"].type) == "double" and str(written["std"].type) == "float"


# the centre is put behind any method: each with the noise that each row has, the first with both
@pytest.mark.parametrize("method", ["deep-ensemble", "mc-dropout", "mean-field"])
@pytest.mark.parametrize("noise", ["constant", "per-row"])
@pytest.mark.slow_where(cell=lambda p: p["noise"] == "constant" and p["method"] != "deep-ensemble")
def test_the_estimator_far_from_zero_and_its_inputs_too(method, noise):
    made = []
    for offset in (0.0, -1.7e9):
        model = vbdl.VBDLRegressor(
            method=method, noise=noise, n_members=2, n_samples=8, epochs=8, hidden=(16,), random_state=0
        )
        rows = X[:, None] + offset / 1.7  # and inputs about 1e9
        model.fit(rows, Y + offset)
        mean, std = model.predict(rows, return_std=True)
        low, high = model.predict_interval(rows)
        made.append((mean - offset, std, low - offset, high - offset))
    for one, other in zip(*made, strict=True):
        assert np.allclose(one, other, atol=0.02)


def test_what_was_rounded_before_is_refused():
    likelihood = Centered(vbdl.Gaussian(), 1.7e9)
    p = vbdl.Predictor(vbdl.DeepEnsemble([torch.nn.Linear(1, 1)]), likelihood, compile=False)
    x = torch.randn(30, 1)
    with pytest.raises(ValueError, match="targets about 1700000000 are too coarse in torch.float32"):
        vbdl.calibrate(p, (x, torch.full((30, 1), 1.7e9)), StdScaling())
    assert (
        vbdl.calibrate(p, (x, torch.arange(30)[:, None] + 1_700_000_000), StdScaling())(x).mean.dtype == torch.float64
    )
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            Centered(vbdl.Gaussian(), bad)
    with pytest.raises(TypeError, match="Gaussian"):
        Centered(vbdl.Categorical(), 1.0)
