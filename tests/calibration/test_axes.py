"""Regressions with any axes behind the batch: everything is what each element gives alone.

The brute force is torch.distributions, element by element. Rows are as many as draws in some: a samples axis that is
put next to the wrong one then broadcasts without a word.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

import vbdl
from vbdl import calibration, metrics, ood
from vbdl.calibration import CQR, AbsoluteIntervals, CDFRecalibration, NormalizedIntervals, StdScaling, calibrate
from vbdl.decision import gaussian_tail, mean_variance_position, mixture_tail, sample_tail

DRAWS = 6
# (rows, axes behind the batch)
SHAPES = [
    (5, ()),
    (DRAWS, (1,)),
    (5, (3,)),
    (DRAWS, (DRAWS,)),
    (DRAWS, (4, 3)),
    (4, (DRAWS, 2)),
    (DRAWS, (DRAWS, DRAWS)),
]
SHAPES += [(3, (2, 4, 5)), (DRAWS, (DRAWS, 2, DRAWS)), (4, (2, 3, 2, 2)), (2, (1, 1)), (1, (3, 1))]
shapes = pytest.mark.parametrize("rows, axes", SHAPES, ids=str)
# for what shares its reading of axes with the test before it: none, one, several of the same size as draws and rows
_FEW = (SHAPES[0], SHAPES[3], SHAPES[8], SHAPES[11])


class Outputs(nn.Module):
    """Linear, with outputs of these axes."""

    def __init__(self, axes, member):
        super().__init__()
        torch.manual_seed(member)
        self.axes, self.lin = axes, nn.Linear(3, math.prod(axes))

    def forward(self, x):
        return self.lin(x).reshape(x.shape[0], *self.axes) if self.axes else self.lin(x).squeeze(-1)


def _predictor(axes, likelihood=None, heads=1):
    shape = axes if heads == 1 else (*axes[:-1], heads * axes[-1])
    named = {"channel_axis": -1} if len(axes) > 2 else {}
    likelihood = likelihood or vbdl.Gaussian(axes[-1] if axes else 1, std=0.4, **named)
    nets = [Outputs(shape, member) for member in range(DRAWS)]
    return vbdl.Predictor(vbdl.DeepEnsemble(nets), likelihood, compile=False, tiles=8)


def _data(rows, axes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=generator), torch.randn(rows, *axes, generator=generator)


def _mixture(p):
    """torch's own mixture of the prediction's components, in float64."""
    mean, log_variance = p.samples.double().movedim(0, -2).unbind(-1)  # (batch, ..., samples)
    weights = Categorical(torch.full(mean.shape, 1 / mean.shape[-1], dtype=torch.float64))
    return MixtureSameFamily(weights, Normal(mean, (0.5 * log_variance).exp()))


def _as_mean(y, p):
    return y.reshape(p.mean.shape)


@shapes
def test_a_prediction_is_that_of_each_element(rows, axes):
    x, y = _data(rows, axes)
    p = _predictor(axes)(x, samples=True)
    right, y = _mixture(p), _as_mean(y, p)
    assert p.mean.shape == y.shape
    torch.testing.assert_close(p.mean.double(), right.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.total.double(), right.variance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.cdf(y).double(), right.cdf(y.double()), rtol=1e-4, atol=1e-5)
    several = torch.stack((y, y + 1, -y))
    torch.testing.assert_close(p.cdf(several).double(), right.cdf(several.double()), rtol=1e-4, atol=1e-5)
    assert p.score(several).shape == several.shape
    torch.testing.assert_close(torch.special.ndtr(p.score(several)), right.cdf(several.double()), rtol=1e-4, atol=1e-5)
    levels = torch.tensor([0.01, 0.3, 0.5, 0.975], dtype=torch.float64)
    found = p.quantile(levels)
    assert found.shape == (4, *p.mean.shape)
    for level, each in zip(levels, found, strict=True):
        torch.testing.assert_close(right.cdf(each.double()), level.expand(each.shape), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p.quantile(level), each)
    low, high = p.interval(0.8)
    inside = right.cdf(high.double()) - right.cdf(low.double())
    torch.testing.assert_close(inside, torch.full_like(inside, 0.8), rtol=1e-4, atol=1e-4)
    # joint over a row: the mixture of whole rows
    components = Normal(*_parts(p)).log_prob(y.double()).reshape(DRAWS, rows, -1).sum(-1)
    torch.testing.assert_close(p.log_prob(y).double(), components.logsumexp(0) - math.log(DRAWS), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError):
        p.cdf(torch.zeros(rows + 1, *y.shape[1:]))
    if len(axes) > 1:
        with pytest.raises(ValueError, match="one y for each element"):
            p.cdf(torch.zeros(rows))


def _parts(p):
    mean, log_variance = p.samples.double().unbind(-1)
    return mean, (0.5 * log_variance).exp()


@shapes
def test_a_covariance_is_between_outputs_at_each_place(rows, axes):
    named = {"channel_axis": -1} if len(axes) > 2 else {}
    x, _ = _data(rows, axes)
    p = _predictor(axes, vbdl.Gaussian(axes[-1] if axes else 1, covariance=True, std=0.4, **named))(x, samples=True)
    mean, std = _parts(p)
    apart = (mean - mean.mean(0)).reshape(DRAWS, -1, mean.shape[-1])
    expected = torch.stack([a.T @ a / DRAWS for a in apart.unbind(1)]) + 0.16 * torch.eye(mean.shape[-1])
    assert p.covariance.shape == (*p.mean.shape, p.mean.shape[-1])
    torch.testing.assert_close(p.covariance.double().reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.covariance.diagonal(dim1=-2, dim2=-1), p.total, rtol=1e-4, atol=1e-5)


@shapes
def test_metrics_are_those_of_each_element(rows, axes):
    x, y = _data(rows, axes)
    p = _predictor(axes)(x, samples=True)
    mean, std = _parts(p)
    y, right = _as_mean(y, p).double(), _mixture(p)
    flat = lambda t: t.reshape(DRAWS, -1)
    for whole, each in (
        (metrics.crps_mixture(mean, std, y), metrics.crps_mixture(flat(mean), flat(std), y.reshape(-1))),
        (metrics.crps_samples(mean, y), metrics.crps_samples(flat(mean), y.reshape(-1))),
        (metrics.crps_gaussian(mean[0], std[0], y), metrics.crps_gaussian(flat(mean)[0], flat(std)[0], y.reshape(-1))),
        (metrics.mixture_cdf(mean, std, y), right.cdf(y).reshape(-1)),
        (metrics.gaussian_cdf(mean[0], std[0], y), Normal(mean[0], std[0]).cdf(y).reshape(-1)),
        (metrics.squared_error(mean[0], y), (mean[0] - y).square().reshape(rows, -1).mean(1)),
        (mixture_tail(mean, std, 0.9).var, mixture_tail(flat(mean), flat(std), 0.9).var),
        (mixture_tail(mean, std, 0.9).es, mixture_tail(flat(mean), flat(std), 0.9).es),
        (gaussian_tail(mean[0], std[0], 0.9).es, gaussian_tail(flat(mean)[0], flat(std)[0], 0.9).es),
        (sample_tail(mean, 0.7).var, sample_tail(flat(mean), 0.7).var),
        (mean_variance_position(mean[0], std[0] ** 2), mean_variance_position(flat(mean)[0], flat(std)[0] ** 2)),
    ):
        if whole.shape != (rows,):
            assert whole.shape == y.shape
        np.testing.assert_allclose(whole.reshape(-1), each, rtol=1e-6, atol=1e-8)
    # of whole rows
    density = Normal(mean, std).log_prob(y).reshape(DRAWS, rows, -1).sum(-1)
    np.testing.assert_allclose(metrics.mixture_nll(mean, std, y), math.log(DRAWS) - density.logsumexp(0), rtol=1e-8)
    np.testing.assert_allclose(metrics.gaussian_nll(mean[0], std[0], y), -density[0], rtol=1e-8)
    norm = lambda t: t.reshape(*t.shape[: t.ndim - y.ndim + 1], -1).norm(dim=-1)
    energy = norm(mean - y).mean(0) - 0.5 * norm(mean.unsqueeze(0) - mean.unsqueeze(1)).mean((0, 1))
    np.testing.assert_allclose(metrics.energy_score(mean, y), energy, rtol=1e-6, atol=1e-9)
    spread = mean.var(0, correction=0).reshape(rows, -1).sum(1)
    np.testing.assert_allclose(ood.epistemic_variance(mean), spread, rtol=1e-8, atol=1e-12)


# one scale for all outputs has no axis to mistake
@shapes
@pytest.mark.parametrize("per_output", [True, False])
@pytest.mark.slow_where(cell=lambda p: not p["per_output"] and (p["rows"], p["axes"]) not in _FEW)
def test_std_scaling_stretches_each_element_by_its_outputs_scale(rows, axes, per_output):
    predict = _predictor(axes)
    x, y = _data(60, axes, 1)
    scaled = calibrate(predict, (x, 3 * y), StdScaling(per_output))
    scale = scaled.likelihood.method.scale
    outputs = axes[-1] if axes else 1
    assert scale.numel() == (outputs if per_output else 1)
    x, y = _data(rows, axes)
    before, after = predict(x, samples=True), scaled(x, samples=True)
    y = _as_mean(y, after)
    mean, std = _parts(before)
    stretched = Normal(mean.mean(0) + scale * (mean - mean.mean(0)), scale * std)
    torch.testing.assert_close(after.cdf(y).double(), stretched.cdf(y.double()).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.total.double(), before.total.double() * scale**2, rtol=1e-4, atol=1e-5)
    # each output's scale is the best: the likelihood of its own elements alone has its minimum there
    x, y = _data(60, axes, 1)
    mean, std = _parts(predict(x, samples=True))
    y = (3 * y).reshape(mean.shape[1:])

    def loss(factor):
        s = factor * scale
        density = Normal(mean.mean(0) + s * (mean - mean.mean(0)), s * std).log_prob(y).logsumexp(0)
        return -density.mean(tuple(range(density.ndim - 1))).sum() if per_output else -density.mean()

    assert loss(1) < loss(0.99) and loss(1) < loss(1.01)


@shapes
def test_cdf_recalibration_bends_each_element(rows, axes):
    predict = _predictor(axes)
    x, y = _data(60, axes, 1)
    bent = calibrate(predict, (x, 3 * y), CDFRecalibration())
    x, y = _data(rows, axes)
    before, after = predict(x, samples=True), bent(x, samples=True)
    y, map_of = _as_mean(y, after), bent.likelihood.method
    level = _mixture(before).cdf(y.double())
    right, told = map_of(level), level < 1 - 1e-9  # nearer to 1 torch's level has no digits for a map to bend
    torch.testing.assert_close(after.cdf(y).double()[told], right[told], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.cdf(after.quantile(0.2)).double(), torch.full_like(right, 0.2), rtol=0, atol=1e-4)
    assert after.log_prob(y).shape == (rows,) and bool(after.log_prob(y).isfinite().all())
    low, high = after.interval(0.8)
    assert low.shape == high.shape == after.mean.shape and bool((low < high).all())


# the three differ in their inputs, and put intervals on elements by the same lines
@shapes
@pytest.mark.parametrize(
    "method", [AbsoluteIntervals(0.2), NormalizedIntervals(0.2), CQR(0.2)], ids=lambda m: type(m).__name__
)
@pytest.mark.slow_where(cell=lambda p: not isinstance(p["method"], CQR) and (p["rows"], p["axes"]) not in _FEW)
def test_conformal_intervals_are_those_of_each_element_alone(rows, axes, method):
    predict = _predictor(axes)
    x, y = _data(40, axes, 1)
    p = predict(x)
    made = calibrate(predict, (x, y), method)
    x_new, _ = _data(rows, axes)
    new, before = made(x_new), predict(x_new)
    assert new.lower.shape == new.upper.shape == new.mean.shape
    y = _as_mean(y, p)
    for element in np.ndindex(*new.mean.shape[1:]):
        at = (slice(None), *element)
        alone = type(method)(0.2).fit(*method.inputs(p.mean[at], p.total[at]), y[at])
        lower, upper = alone(*method.inputs(before.mean[at], before.total[at]))
        torch.testing.assert_close(new.lower[at], lower)
        torch.testing.assert_close(new.upper[at], upper)
    assert 0.7 <= metrics.interval_coverage(*(getattr(made(x), n) for n in ("lower", "upper")), y) <= 0.95


@pytest.mark.parametrize("axis", [1, -3], ids=str)
@pytest.mark.parametrize(
    "batch, channels, height, width",
    [(DRAWS, 2, DRAWS, 3), *(pytest.param(*s, marks=pytest.mark.slow) for s in ((4, 1, 6, 6), (3, 3, 3, 3)))],
)
def test_images_keep_their_channels_where_they_are(axis, batch, channels, height, width):
    """The same network with its channels last gives the same numbers, moved."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, height, width), torch.randn(batch, channels, height, width)
    for make, heads in ((vbdl.HeteroscedasticGaussian, 2), (lambda **k: vbdl.Gaussian(channels, std=0.3, **k), 1)):
        nets = [nn.Conv2d(3, heads * channels, 3, padding=1) for _ in range(DRAWS)]
        last = [nn.Sequential(net, Last()) for net in nets]
        first = vbdl.Predictor(vbdl.DeepEnsemble(nets), make(covariance=True, channel_axis=axis), compile=False)
        other = vbdl.Predictor(vbdl.DeepEnsemble(last), make(covariance=True, channel_axis=-1), compile=False)
        a, b = first(x, samples=True), other(x, samples=True)
        assert a.mean.shape == (batch, channels, height, width)
        for name in ("mean", "total", "aleatoric", "epistemic"):
            torch.testing.assert_close(getattr(a, name).movedim(1, -1), getattr(b, name))
        torch.testing.assert_close(a.covariance, b.covariance)
        torch.testing.assert_close(a.cdf(y).movedim(1, -1), b.cdf(y.movedim(1, -1)))
        torch.testing.assert_close(a.quantile(0.1).movedim(1, -1), b.quantile(0.1))
        torch.testing.assert_close(a.log_prob(y), b.log_prob(y.movedim(1, -1)))
        torch.testing.assert_close(first.log_prob(x, y), a.log_prob(y), rtol=1e-4, atol=1e-3)
        for method in (StdScaling(), StdScaling(False), CDFRecalibration(), AbsoluteIntervals(0.3), CQR(0.3)):
            c, d = calibrate(first, (x, y), method), calibrate(other, (x, y.movedim(1, -1)), method)
            c, d = c(x, samples=True), d(x, samples=True)
            for name in ("total", "lower", "upper", "covariance"):
                found, right = getattr(c, name, None), getattr(d, name, None)
                if found is not None:
                    moved = found if name == "covariance" else found.movedim(1, -1)
                    torch.testing.assert_close(moved, right, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(c.quantile(0.1).movedim(1, -1), d.quantile(0.1), rtol=1e-4, atol=1e-4)


class Last(nn.Module):
    def forward(self, x):
        return x.movedim(1, -1)


def test_images_train_with_one_noise_level_a_channel():
    torch.manual_seed(0)
    x = torch.randn(64, 2, 5, 5)
    y = x + torch.randn(64, 2, 5, 5) * torch.tensor([0.2, 1.0]).reshape(2, 1, 1)
    q, likelihood = vbdl.DeepEnsemble(nn.Conv2d(2, 2, 1), 2), vbdl.Gaussian(2, channel_axis=1)
    vbdl.fit(q, (x, y), likelihood, epochs=150, lr=2e-2, compile=False, progress=False)
    assert likelihood.noise_std.shape == (2, 2)
    np.testing.assert_allclose(likelihood.noise_std.numpy(), [[0.2, 1.0]] * 2, rtol=0.15)


@pytest.mark.parametrize("make", [vbdl.HeteroscedasticGaussian, lambda **k: vbdl.Gaussian(6, **k)])
def test_an_axis_that_was_not_named_is_asked_for(make):
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout2d(0.2), nn.Conv2d(2, 2, 1))
    x, y = torch.randn(4, 3, 6, 6), torch.randn(4, 2, 6, 6)
    with pytest.raises(ValueError, match=r"name the axis, .*channel_axis=1"):
        vbdl.Predictor(vbdl.MCDropout(net), make(), compile=False)(x)
    with pytest.raises(ValueError, match=r"name the axis, .*channel_axis=1"):
        vbdl.fit(vbdl.MCDropout(net), (x, y), make(), epochs=1, compile=False, progress=False)
    with pytest.raises(ValueError, match="channel_axis must not be 0"):
        make(channel_axis=0)
    with pytest.raises(ValueError, match="returned 4 axes"):
        vbdl.Predictor(vbdl.MCDropout(net), make(channel_axis=4), compile=False)(x)


def test_the_axis_is_stored(tmp_path):
    nets = [nn.Conv2d(3, 2, 1) for _ in range(2)]
    p = vbdl.Predictor(vbdl.DeepEnsemble(nets), vbdl.HeteroscedasticGaussian(channel_axis=1), compile=False)
    x = torch.randn(4, 3, 6, 6)
    expected = p(x)
    p.save(tmp_path / "m")
    found = vbdl.load(tmp_path / "m", compile=False)(x)
    assert torch.equal(found.mean, expected.mean) and found.output_axis == expected.output_axis == -3
    assert "channel_axis=1" in repr(p.likelihood)


def test_every_calibration_of_a_regression_is_tried_here():
    """A new one is added to the tests above."""
    kinds = {
        n for n, c in vars(calibration).items() if isinstance(c, type) and getattr(c, "acts_on", "") == "prediction"
    }
    assert kinds - {"ConformalSets"} == {
        "StdScaling", "CDFRecalibration", "AbsoluteIntervals", "NormalizedIntervals", "CQR",
    }  # fmt: skip
