"""Every decision on every calibration: what is decided is read from the calibrated distribution.

Both lists are the package's own, so that a new calibration or decision is crossed with all others, or named here as one
that cannot be. The brute force knows nothing of the running sums: it reads the calibrated prediction with its samples.
"""

import inspect
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl import calibration, decision
from vbdl.calibration import CDFRecalibration, NormalizedIntervals, StdScaling, calibrate
from vbdl.decision import REFER, HandOver, PathBounds, Referral, Risk, uncertainty_of, with_decision
from vbdl.likelihoods.centered import Centered
from vbdl.likelihoods.mixture import mixture_quantile

CALIBRATIONS = {
    name: cls
    for name, cls in vars(calibration).items()
    if inspect.isclass(cls) and issubclass(cls, nn.Module) and (hasattr(cls, "acts_on") or name == "Temperature")
}
DECISIONS = {
    name: cls
    for name, cls in vars(decision).items()
    if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls is not decision.DecidingLikelihood
}
_ALPHA = ("ConformalSets", "AbsoluteIntervals", "NormalizedIntervals", "CQR")
_REGRESSION = ("StdScaling", "CDFRecalibration", "AbsoluteIntervals", "NormalizedIntervals", "CQR")


_BESIDE = ("AbsoluteIntervals", "NormalizedIntervals")  # put around the distribution by the lines of CQR


def _made(name):
    """A calibration with what it needs; both ways of a temperature."""
    if name == "Temperature":
        return [calibration.Temperature(), calibration.Temperature("probs")]
    return [CALIBRATIONS[name](0.1)] if name in _ALPHA else [CALIBRATIONS[name]()]


def _predictor(outputs, likelihood, members=5, spread=1.5):
    nets = []
    for seed in range(members):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, outputs)))
        nets[-1][2].weight.data.mul_(spread)
    return vbdl.Predictor(vbdl.DeepEnsemble(nets), likelihood, compile=False)


@pytest.fixture(scope="module")
def classes():
    torch.manual_seed(9)
    x = torch.randn(600, 3)
    predict = _predictor(3, vbdl.Categorical(), spread=4.0)
    return predict, x, torch.multinomial(predict(x).probs.sqrt(), 1).squeeze(1)  # less sure than it says


@pytest.fixture(scope="module")
def outputs():
    torch.manual_seed(9)
    x = torch.randn(600, 3)
    return _predictor(2, vbdl.Gaussian(2, std=0.3)), x, 2 * torch.distributions.StudentT(3.0).sample((600, 2))


def _of_classes():
    found = [n for n in CALIBRATIONS if n not in _REGRESSION]
    return [(None, None), *((n, i) for n in found for i in range(len(_made(n))))]


def _of_outputs(*pairs):
    """None, each calibration alone, and two after each other: those of `pairs` by default, the others slow."""
    single = [(n,) for n in CALIBRATIONS if n in _REGRESSION and n not in _BESIDE]
    single += [pytest.param((n,), marks=pytest.mark.slow) for n in _BESIDE]
    ordered = itertools.permutations(("StdScaling", "CDFRecalibration", "CQR"), 2)
    both = [names if names in pairs else pytest.param(names, marks=pytest.mark.slow) for names in ordered]
    return [(), *single, *both]


# intervals are put around what was calibrated before them and do not change it: of the pairs with them, the one that
# bends under the intervals is kept
BENT, SCALED_AND_BENT = ("CDFRecalibration", "CQR"), ("StdScaling", "CDFRecalibration")
REFUSED = ("CDFRecalibration", "StdScaling")


def test_nothing_is_left_out():
    """A new calibration or decision appears in one of the tests below, or fails here."""
    alone = {"AnomalyFlags", "ExpectedCost", "HandOver", "PathBounds", "Referral", "Risk"}
    assert set(DECISIONS) == alone | {"AnyOf", "OutOfDistribution"}
    for name in CALIBRATIONS:
        assert _made(name)[0].acts_on in ("logits", "probs", "prediction")


# each calibration with the kind that is a difference of two numbers, and the one that is read from probabilities; the
# two that these are made of without a calibration
@pytest.mark.parametrize("kinds", [("epistemic", "confidence"), ("total", "aleatoric")], ids=" and ".join)
@pytest.mark.parametrize("name, which", _of_classes())
@pytest.mark.slow_where(cell=lambda p: "total" in p["kinds"] and p["name"] is not None)
def test_decisions_about_classes(classes, name, which, kinds):
    predict, x, y = classes
    calibrated = predict if name is None else calibrate(predict, (x[:300], y[:300]), _made(name)[which])
    new = x[300:]
    p = calibrated(new, samples=True)
    cost = torch.tensor([[0.0, 2.0, 5.0], [3.0, 0.0, 1.0], [9.0, 2.0, 0.0]])
    spent = p.probs.double() @ cost.double()
    action = with_decision(calibrated, decision.ExpectedCost(cost, 1.1))(new).action
    assert torch.equal(action, torch.where(spent.min(1).values > 1.1, REFER, spent.argmin(1)))
    for kind in kinds:
        u = uncertainty_of(p, kind).double()
        middle, high = float(u.quantile(0.5)), float(u.quantile(0.8))
        referred = with_decision(calibrated, Referral(kind, middle))(new).action
        assert torch.equal(referred, torch.where(u >= middle, REFER, p.probs.argmax(1)))
        machine = HandOver((middle, middle), (high, high), kind=kind)
        assert torch.equal(with_decision(calibrated, machine)(new).action, (u >= middle).long() + (u >= high).long())
        flags = decision.AnomalyFlags(0.1, kind).fit(uncertainty_of(calibrated(x[:300]), kind))
        found = with_decision(calibrated, flags)(new).action
        assert torch.equal(found, torch.stack([(flags.scores >= v).sum() for v in u]) + 1 <= 30)
        # a distance is of the network, whatever its probabilities are calibrated to
        guard = decision.OutOfDistribution().fit(calibrated, x[:100], x[100:300], share=0.1)
        rules = with_decision(calibrated, decision.AnyOf([Referral(kind, middle), guard]))(new)
        assert torch.equal(rules.action, torch.where(guard.refers(calibrated, new), REFER, referred))


def _quantiles(p, levels):
    return torch.stack([p.quantile(level).double() for level in levels])


# in chunks, where sums of draws are put together: without a calibration and with one that reads their distribution
@pytest.mark.parametrize("names", _of_outputs(BENT, SCALED_AND_BENT, REFUSED), ids="-".join)
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.slow_where(cell=lambda p: p["chunk"] and p["names"] not in ((), ("CDFRecalibration",)))
def test_decisions_about_outputs(outputs, names, chunk):
    predict, x, y = outputs
    calibrated = predict.replace(chunk_size=chunk)
    for number, name in enumerate(names):
        if name == "StdScaling" and "CDFRecalibration" in names[:number]:
            with pytest.raises(ValueError, match="was fitted to"):
                calibrate(calibrated, (x[:300], y[:300]), _made(name)[0])
            return
        calibrated = calibrate(calibrated, (x[:300], y[:300]), _made(name)[0])
    new = x[300:320]
    p = calibrated(new, samples=True)
    # value at risk, expected shortfall, mean and variance from 20,000 quantiles
    d = with_decision(calibrated, Risk(level=0.95, fraction=1.0, limit=1e9, max_var=0.5))(new)
    torch.testing.assert_close(d.var, -p.quantile(0.05), rtol=1e-4, atol=1e-4)
    levels = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    tail = _quantiles(p, 0.05 * levels)
    np.testing.assert_allclose(d.es, -tail.mean(0), rtol=2e-3, atol=2e-3)
    every = _quantiles(p, levels)
    mean, variance = every.mean(0), every.var(0, correction=0)
    position = mean / variance
    own = torch.where(position > 0, -position * p.quantile(0.05), -position * p.quantile(0.95))
    expected = position * (0.5 / own.clamp(min=0.5))
    np.testing.assert_allclose(d.action, expected, rtol=0.03, atol=0.01)
    # a decision by hand on the prediction is the one inside
    by_hand = Risk(level=0.95, fraction=1.0, limit=1e9, max_var=0.5)(p)
    for field in ("action", "var", "es"):
        torch.testing.assert_close(by_hand[field], getattr(d, field), rtol=1e-4, atol=1e-5)
    # a path that leaves its bounds: steps depend on each other through the draw, their margins are the calibrated ones
    bounds = PathBounds(-3.0, torch.tensor([2.0, 4.0]))
    risk = with_decision(calibrated, HandOver((0.3, 0.3), (0.6, 0.6), bounds=bounds))(new)
    drawn, log_variance = p.samples.double().unbind(-1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, *drawn.shape, generator=generator, dtype=torch.float64)
    paths = (drawn + (0.5 * log_variance).exp() * noise).flatten(0, 1)
    if "CDFRecalibration" in names:
        map_of = next(m for m in _methods(calibrated.likelihood) if isinstance(m, CDFRecalibration))
        plain = vbdl.likelihoods.normal_mixture.RegressionPrediction(
            mean=p.mean, total=p.total, aleatoric=p.aleatoric, epistemic=p.epistemic, n_samples=5, samples=p.samples
        )
        score = map_of.inverse(plain.score(paths))
        grid = torch.linspace(-8, 8, 400, dtype=torch.float64)
        std = (0.5 * log_variance).exp().unsqueeze(1)
        ends = mixture_quantile(drawn.unsqueeze(1), std, grid.reshape(-1, 1, 1))
        paths = _interpolated(score, grid, ends)
    crossed = ((paths < -3) | (paths > torch.tensor([2.0, 4.0]))).any(-1).double().mean(0)
    np.testing.assert_allclose(risk.risk, crossed, atol=6 * 0.5 / (1000 * 5) ** 0.5 + 1e-3)
    assert torch.equal(risk.action, (risk.risk >= 0.3).long() + (risk.risk >= 0.6).long())
    # and what is about one number a row, of one output
    one = p.total[:, 0]
    for kind in ("total", "aleatoric", "epistemic"):
        assert torch.equal(uncertainty_of(p.total[:, :1], kind), one)


def _interpolated(score, grid, ends):
    """Value of these scores, (paths, batch, outputs), from a table (grid, batch, outputs) of values."""
    place = torch.searchsorted(grid, score.contiguous()).clamp(1, len(grid) - 1)
    share = (score - grid[place - 1]) / (grid[place] - grid[place - 1])
    return ends.gather(0, place - 1) * (1 - share) + ends.gather(0, place) * share


def _methods(likelihood):
    while hasattr(likelihood, "method"):
        yield likelihood.method
        likelihood = likelihood.likelihood


# two after each other are tried with two outputs, above
@pytest.mark.parametrize("names", _of_outputs(SCALED_AND_BENT), ids="-".join)
def test_uncertainties_of_one_output(outputs, names):
    predict = _predictor(2, vbdl.HeteroscedasticGaussian())
    _, x, y = outputs
    if names.count("StdScaling") and names.index("StdScaling") > 0 and "CDFRecalibration" in names:
        return  # refused, in the test above
    for name in names:
        predict = calibrate(predict, (x[:300], y[:300, :1]), _made(name)[0])
    new = x[300:]
    p = predict(new)
    for kind in ("total", "aleatoric", "epistemic"):
        u = getattr(p, kind).squeeze(1).double()
        middle = float(u.quantile(0.5))
        machine = HandOver((middle, middle), (1e9, 1e9), kind=kind)
        assert torch.equal(with_decision(predict, machine)(new).action, (u >= middle).long())
        flags = decision.AnomalyFlags(0.1, kind).fit(getattr(predict(x[:300]), kind).squeeze(1))
        assert torch.equal(with_decision(predict, flags)(new).action, flags.p_values(u) <= 0.1 + 1e-12)


def test_the_draws_are_the_same_in_any_chunks_sizes_and_estimators(outputs, tmp_path):
    predict, x, y = outputs
    x = x[:70]
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    wide = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2))
    several = vbdl.Predictor(vbdl.DeepEnsemble([net[0:2] + net[3:], wide, wide]), vbdl.Gaussian(2), compile=False)
    dropout = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Gaussian(2), n_samples=12, compile=False)
    for one in (predict, dropout, several):
        calibrated = calibrate(calibrate(one, (x, y[:70]), StdScaling()), (x, y[:70]), CDFRecalibration())
        deciding = with_decision(calibrated, Risk(level=0.9))
        expected = -calibrated(x, samples=True).quantile(0.1)
        for other in (deciding, deciding.replace(chunk_size=2)):
            torch.testing.assert_close(other(x).var, expected, rtol=1e-4, atol=1e-4)
    # `deciding` is now of several architectures
    smaller = deciding.replace(chunk_size=5, tiles=(1, 16))
    torch.testing.assert_close(smaller(x).var, expected, rtol=1e-4, atol=1e-4)
    deciding.save(tmp_path / "m", example=x)
    torch.testing.assert_close(vbdl.load(tmp_path / "m", compile=False)(x).var, deciding(x).var)
    # more draws than it was made for, and fewer, and a deadline that stops before the last
    deciding = with_decision(dropout, Risk(level=0.9))
    for n in (3, 40):
        expected = -dropout.replace(n_samples=n)(x, samples=True).quantile(0.1)
        torch.testing.assert_close(deciding.replace(n_samples=n)(x).var, expected, rtol=1e-4, atol=1e-4)
    early = deciding.replace(n_samples=40, chunk_size=8)(x, tolerance=1e9)
    assert early.n_samples == 16
    expected = -dropout.replace(n_samples=16)(x, samples=True).quantile(0.1)
    torch.testing.assert_close(early.var, expected, rtol=1e-4, atol=1e-4)
    moments = deciding.replace(estimator="moments")(x)
    assert float((moments.var - deciding.replace(n_samples=400)(x).var).abs().mean()) < 0.1


def test_a_normal_alone_is_the_textbook():
    predict = _predictor(2, vbdl.HeteroscedasticGaussian(), members=1)
    x = torch.randn(40, 3)
    p, d = predict(x), with_decision(predict, Risk(0.99))(x)
    torch.testing.assert_close(d.var, 2.3263479 * p.std - p.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d.es, 2.6652142 * p.std - p.mean, rtol=1e-4, atol=1e-4)


def test_intervals_leave_the_paths_as_they_are(outputs):
    predict, x, y = outputs
    machine = HandOver((0.6, 0.3), (0.9, 0.5), bounds=PathBounds(-1.0))
    widened = calibrate(predict, (x, y), NormalizedIntervals(0.1))
    assert torch.equal(with_decision(widened, machine)(x).risk, with_decision(predict, machine)(x).risk)


@pytest.mark.slow
@pytest.mark.parametrize("method", [StdScaling(), CDFRecalibration()], ids=lambda m: type(m).__name__)
def test_compiled_it_is_the_same(outputs, method):
    predict, x, y = outputs
    deciding = with_decision(calibrate(predict, (x, y), method), Risk(0.95, max_var=0.5))
    compiled = deciding.replace(compile=True)
    for name in ("var", "es", "action"):
        torch.testing.assert_close(getattr(compiled(x), name), getattr(deciding(x), name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [None, StdScaling(), CDFRecalibration()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("decide", ["risk", "path"])
def test_targets_counted_from_far_away_are_decided_on_as_near_ones(outputs, method, decide):
    predict, x, y = outputs
    center = 1.7e9

    def decided(by):
        likelihood = vbdl.Gaussian(2, std=0.3)
        one = predict.replace(likelihood=Centered(likelihood, by) if by else likelihood)
        targets = y.double() + by if by else y
        one = one if method is None else calibrate(one, (x[:300], targets[:300]), type(method)())
        path = HandOver((0.3, 0.3), (0.6, 0.6), bounds=PathBounds(upper=by + 1.0))
        return with_decision(one, Risk(0.95) if decide == "risk" else path)(x[300:])

    near, far = decided(0.0), decided(center)
    if decide == "risk":
        for name in ("var", "es"):
            shifted = getattr(far, name).double() + center
            torch.testing.assert_close(shifted, getattr(near, name).double(), rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(far.risk.double(), near.risk.double(), rtol=1e-3, atol=1e-4)
        assert float(near.risk.std()) > 1e-3 and float((far.action == near.action).double().mean()) > 0.99
