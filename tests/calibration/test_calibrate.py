"""Calibration of whole predictors: the same draws, rows that training never saw, fields that stay meaningful."""

import copy
import dataclasses
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import vbdl
from vbdl import metrics
from vbdl.calibration import (
    APS,
    CQR,
    AbsoluteIntervals,
    Beta,
    CDFRecalibration,
    ConformalSets,
    Isotonic,
    MatrixScaling,
    NormalizedIntervals,
    Platt,
    StdScaling,
    Temperature,
    VectorScaling,
    calibrate,
    set_coverage,
)
from vbdl.decision import REFER, ExpectedCost, Referral, with_decision
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.bernoulli import Bernoulli
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.training.fit import fit


def _mlp(outputs, dropout=0.05):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, outputs))


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1400, 4, generator=generator)
    score = x[:, 0] + x[:, 1] * x[:, 2] + 0.8 * torch.randn(1400, generator=generator)
    y = (score > -0.5).long() + (score > 0.8).long()
    return x, y


TRAIN, CALIBRATION, TEST = slice(0, 300), slice(300, 800), slice(800, 1400)


@pytest.fixture(scope="module")
def classifier(rows):
    x, y = rows
    posterior, likelihood = MCDropout(_mlp(3)), Categorical()
    fit(posterior, (x[TRAIN], y[TRAIN]), likelihood, epochs=250, batch_size=300, lr=2e-2, progress=False, compile=False)
    return Predictor(posterior, likelihood, n_samples=8, seed=3, compile=False)


@pytest.fixture(scope="module")
def ensemble(rows):
    x, y = rows
    posterior, likelihood = DeepEnsemble(_mlp(3, 0.0), n_members=4), Categorical()
    fit(posterior, (x[TRAIN], y[TRAIN]), likelihood, epochs=250, batch_size=300, lr=2e-2, progress=False, compile=False)
    return Predictor(posterior, likelihood, compile=False)


@pytest.fixture(scope="module")
def regressor(rows):
    x, _ = rows
    generator = torch.Generator().manual_seed(1)
    y = torch.stack((x[:, 0] * x[:, 1], x[:, 2] + x[:, 3]), 1) + torch.randn(1400, 2, generator=generator) * 0.5
    posterior, likelihood = DeepEnsemble(_mlp(2, 0.0), n_members=3), Gaussian(2)
    fit(posterior, (x[:100], y[:100]), likelihood, epochs=200, lr=1e-2, progress=False, compile=False)
    return Predictor(posterior, likelihood, compile=False), x, y


@pytest.mark.parametrize("which", ["classifier", "ensemble"])
@pytest.mark.parametrize(
    "method", [Temperature(), Temperature("probs"), VectorScaling(), MatrixScaling(), Isotonic(), Beta()]
)
def test_calibrated_predictors_are_better_calibrated(which, method, rows, request):
    # torch-uncertainty refuses to calibrate an ensemble
    predict = request.getfixturevalue(which)
    x, y = rows
    before = predict(x[TEST])
    calibrated = calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), method)
    after = calibrated(x[TEST])
    assert metrics.ece(after.probs, y[TEST]) < metrics.ece(before.probs, y[TEST]) - 0.03
    assert float(metrics.brier_score(after.probs, y[TEST]).mean()) < float(
        metrics.brier_score(before.probs, y[TEST]).mean()
    )
    np.testing.assert_allclose(after.total, after.aleatoric + after.epistemic, atol=1e-6)
    assert float(after.epistemic.min()) >= 0 and float(after.aleatoric.min()) >= -1e-7
    entropy = -torch.xlogy(after.probs, after.probs).sum(1)
    np.testing.assert_allclose(after.total, entropy, atol=1e-6)
    # the old predictor and the method are as they were
    assert torch.equal(predict(x[TEST]).probs, before.probs)
    assert getattr(method, "temperature", 1.0) == 1.0
    assert calibrated.n_samples == predict.n_samples and calibrated.seed == predict.seed


def test_temperature_on_logits_is_that_of_the_draws(classifier, rows):
    x, y = rows
    calibrated = calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), Temperature())
    t = calibrated.likelihood.method.temperature
    assert t > 1.2
    logits = classifier(x[TEST], samples=True).samples
    p = (logits / t).softmax(2)
    after = calibrated(x[TEST], samples=True)
    np.testing.assert_allclose(after.probs, p.mean(0), atol=1e-6)
    np.testing.assert_allclose(after.samples, logits / t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.aleatoric, -torch.xlogy(p, p).sum(2).mean(0), atol=1e-6)
    fitted = Temperature().fit(classifier(x[CALIBRATION], samples=True).samples, y[CALIBRATION])
    assert t == pytest.approx(fitted.temperature, rel=1e-6)
    np.testing.assert_allclose(calibrated.log_prob(x[TEST], y[TEST]), after.log_prob(y[TEST]), atol=1e-5)


def test_epistemic_share_is_carried_over_by_probability_methods(ensemble, rows):
    x, y = rows
    before = ensemble(x[TEST])
    after = calibrate(ensemble, (x[CALIBRATION], y[CALIBRATION]), Temperature("probs"))(x[TEST])
    np.testing.assert_allclose(after.epistemic / after.total, before.epistemic / before.total, atol=1e-4)
    assert torch.equal(after.label, before.label)
    with pytest.raises(ValueError, match="log_prob"):
        calibrate(ensemble, (x[CALIBRATION], y[CALIBRATION]), Temperature("probs")).log_prob(x[TEST], y[TEST])


def test_training_rows_are_refused_and_counted(classifier, ensemble, rows):
    x, y = rows
    for predict in (classifier, ensemble):
        with pytest.raises(ValueError, match="10 of 60 calibration rows were trained on"):
            calibrate(predict, (x[290:350], y[290:350]), Temperature())
        with pytest.raises(ValueError, match="10 of 60 calibration rows were trained on"):
            calibrate(predict, (x[290:350].numpy(), y[290:350].numpy()), Temperature())
        with pytest.raises(ValueError, match="300 of 300"):
            calibrate(predict, (x[TRAIN], y[TRAIN]), ConformalSets(0.1))
        allowed = calibrate(predict, (x[290:350], y[290:350]), Temperature(), allow_overlap=True)
        assert int(allowed.likelihood.n_overlap) == 10 and int(allowed.likelihood.n_rows) == 60
        clean = calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), Temperature())
        assert int(clean.likelihood.n_overlap) == 0
        # and what was calibrated already still knows its training rows
        with pytest.raises(ValueError, match="trained on"):
            calibrate(clean, (x[TRAIN], y[TRAIN]), ConformalSets(0.1))


def test_training_rows_of_an_ensemble_of_several_architectures_are_refused(rows):
    x, y = rows
    wide, narrow = (torch.nn.Sequential(torch.nn.Linear(x.shape[1], n), torch.nn.Linear(n, 3)) for n in (8, 4))
    mixed, likelihood = vbdl.DeepEnsemble([wide, narrow, wide]), vbdl.Categorical()
    vbdl.fit(mixed, (x[TRAIN], y[TRAIN]), likelihood, epochs=1, compile=False, progress=False)
    predict = vbdl.Predictor(mixed, likelihood, compile=False)
    with pytest.raises(ValueError, match="10 of 60 calibration rows were trained on"):
        calibrate(predict, (x[290:350], y[290:350]), Temperature())
    calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), Temperature())


def test_order_of_calibrations(classifier, rows):
    x, y = rows
    logits_first = calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), Temperature())
    both = calibrate(logits_first, (x[CALIBRATION], y[CALIBRATION]), ConformalSets(0.1, APS()))
    p = both(x[TEST])
    assert torch.equal(p.probs, logits_first(x[TEST]).probs)
    assert p.sets.dtype == torch.bool and p.sets.shape == p.probs.shape
    with pytest.raises(ValueError, match="calibrate the logits first"):
        calibrate(both, (x[CALIBRATION], y[CALIBRATION]), Temperature())


def test_sets_cover(classifier, rows):
    x, y = rows
    covered = []
    for seed in range(30):
        order = 300 + torch.randperm(1100, generator=torch.Generator().manual_seed(seed))
        fitted, new = order[:500], order[500:]
        sets = ConformalSets(0.1).fit(classifier(x[fitted]).probs, y[fitted])
        covered.append(float(set_coverage(sets(classifier(x[new]).probs), y[new]).mean()))
    assert abs(np.mean(covered) - 0.9) < 0.015
    p = calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), ConformalSets(0.1))(x[TEST])
    assert float(set_coverage(p.sets, y[TEST]).mean()) > 0.86
    assert {f.name for f in dataclasses.fields(p)} >= {"probs", "total", "sets"}


def test_binary_questions(rows):
    x, y = rows
    yes = (y > 0).float()
    posterior, likelihood = MCDropout(_mlp(1)), Bernoulli()
    fit(
        posterior,
        (x[TRAIN], yes[TRAIN]),
        likelihood,
        epochs=250,
        batch_size=300,
        lr=2e-2,
        progress=False,
        compile=False,
    )
    predict = Predictor(posterior, likelihood, n_samples=8, compile=False)
    before = predict(x[TEST])
    for method in (Temperature(), Temperature("probs"), Platt(), Isotonic()):
        after = calibrate(predict, (x[CALIBRATION], yes[CALIBRATION]), method)(x[TEST])
        assert after.probs.shape == (600,)
        np.testing.assert_allclose(after.total, after.aleatoric + after.epistemic, atol=1e-6)
        a, b = (float(metrics.brier_score(p.probs, yes[TEST].long()).mean()) for p in (after, before))
        assert a < b
    with pytest.raises(ValueError, match="Temperature or Platt"):
        calibrate(predict, (x[CALIBRATION], yes[CALIBRATION]), VectorScaling())
    for targets in (yes, yes.long(), yes.bool()):
        sets = calibrate(predict, (x[CALIBRATION], targets[CALIBRATION]), ConformalSets(0.1))(x[TEST]).sets
        assert sets.shape == (600, 2) and float(set_coverage(sets, yes[TEST].long()).mean()) > 0.86
    actions = with_decision(predict, Referral("confidence", 0.2))(x[TEST])
    kept = actions.action != REFER
    assert torch.equal(actions.action[kept], (actions.probs[kept] >= 0.5).long())


def test_std_scaling_of_an_ensemble(regressor):
    predict, x, y = regressor
    before = predict(x[TEST], samples=True)
    calibrated = calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), StdScaling())
    after = calibrated(x[TEST], samples=True)
    scale = calibrated.likelihood.method.scale
    assert bool((scale > 1.1).all())
    for name in ("total", "aleatoric", "epistemic"):
        expected = getattr(before, name) * (scale**2).float()
        np.testing.assert_allclose(getattr(after, name), expected, rtol=1e-5)
    assert torch.equal(after.mean, before.mean)
    # the kept samples are the calibrated mixture
    np.testing.assert_allclose(after.samples[..., 0].var(0, correction=0), after.epistemic, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(after.samples[..., 1].exp().mean(0), after.aleatoric, rtol=1e-5)
    assert float(after.log_prob(y[TEST]).mean()) > float(before.log_prob(y[TEST]).mean()) + 0.05
    pit = [metrics.quantile_calibration_error(p.cdf(y[TEST])) for p in (before, after)]
    assert pit[1] < pit[0] / 1.5
    with pytest.raises(ValueError, match="class probabilities"):
        calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), Temperature())


def test_cdf_recalibration_of_an_ensemble(regressor):
    predict, x, y = regressor
    before = predict(x[TEST], samples=True)
    after = calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), CDFRecalibration())(x[TEST], samples=True)
    assert torch.equal(after.total, before.total) and torch.equal(after.mean, before.mean)
    errors = [metrics.quantile_calibration_error(p.cdf(y[TEST])) for p in (before, after)]
    assert errors[1] < errors[0] / 1.5
    lower, upper = after.interval(0.9)
    assert metrics.interval_coverage(lower, upper, y[TEST]) == pytest.approx(0.9, abs=0.04)
    # quantile and cdf are inverse
    np.testing.assert_allclose(after.cdf(after.quantile(0.3)), np.full((600, 2), 0.3), atol=2e-3)
    assert type(after.log_prob(y[TEST])) is torch.Tensor and after.log_prob(y[TEST]).shape == (600,)


def test_recalibrated_density_integrates_to_one():
    from vbdl.calibration.recalibrated import RecalibratedPrediction

    generator = torch.Generator().manual_seed(0)
    recalibration = CDFRecalibration().fit(torch.rand(30, generator=generator, dtype=torch.float64) ** 2)
    samples = torch.randn(4, 1, 1, 2, generator=generator, dtype=torch.float64) * 0.5
    zero = torch.zeros(1, 1, dtype=torch.float64)
    fields = ("mean", "total", "aleatoric", "epistemic", "standard_error")
    p = RecalibratedPrediction(**dict.fromkeys(fields, zero), n_samples=4, samples=samples, recalibration=recalibration)
    grid = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
    many = RecalibratedPrediction(
        **dict.fromkeys(fields, zero.expand(60_001, 1)),
        n_samples=4,
        samples=samples.expand(4, 60_001, 1, 2),
        recalibration=recalibration,
    )
    density = many.log_prob(grid.unsqueeze(1)).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-3)
    # and its integral up to a point is the cdf there
    at = 25_000
    assert float(torch.trapezoid(density[: at + 1], grid[: at + 1])) == pytest.approx(
        float(p.cdf(grid[at].reshape(1, 1))), abs=1e-3
    )


def test_recalibrated_joint_density_of_several_outputs_integrates_to_one():
    """Outputs that depend on each other through the draw: the product of the slopes alone is no density."""
    from vbdl.calibration.recalibrated import RecalibratedPrediction

    recalibration = CDFRecalibration().fit_scores(2 * torch.randn(400, generator=torch.Generator().manual_seed(0)))
    mean = torch.tensor([[-1.5, -1.0], [1.0, 1.5], [0.0, 0.2]], dtype=torch.float64)
    samples = torch.stack((mean, torch.full_like(mean, 2 * math.log(0.5))), -1).unsqueeze(1)
    side = torch.linspace(-14, 14, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    zero = torch.zeros(1, 1, dtype=torch.float64).expand(len(grid), 2)
    many = samples.expand(3, len(grid), 2, 2)
    fields = ("mean", "total", "aleatoric", "epistemic", "standard_error")
    p = RecalibratedPrediction(**dict.fromkeys(fields, zero), n_samples=3, samples=many, recalibration=recalibration)
    density = p.log_prob(grid).exp().reshape(401, 401)
    assert float(torch.trapezoid(torch.trapezoid(density, side), side)) == pytest.approx(1.0, abs=1e-3)
    # and its margins are the recalibrated ones
    margin = torch.cumulative_trapezoid(torch.trapezoid(density, side), side)
    np.testing.assert_allclose(margin, p.cdf(grid)[:, 0].reshape(401, 401)[1:, 0], atol=2e-3)


def test_recalibrations_follow_each_other_and_keep_what_was_added(regressor):
    predict, x, y = regressor
    widened = calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), AbsoluteIntervals(0.1))
    once = calibrate(widened, (x[CALIBRATION], y[CALIBRATION]), CDFRecalibration())
    twice = calibrate(once, (x[CALIBRATION], 2 * y[CALIBRATION]), CDFRecalibration())
    before, p = once(x[TEST], samples=True), twice(x[TEST], samples=True)
    assert torch.equal(p.lower, widened(x[TEST]).lower) and torch.equal(before.upper, widened(x[TEST]).upper)
    second = twice.likelihood.method
    np.testing.assert_allclose(p.cdf(y[TEST]), second(before.cdf(y[TEST]).double()), atol=1e-5)
    np.testing.assert_allclose(p.cdf(p.quantile(0.7)), np.full((600, 2), 0.7), atol=1e-4)
    again = pickle.loads(pickle.dumps(p))
    assert torch.equal(again.lower, p.lower) and torch.equal(again.quantile(0.3), p.quantile(0.3))
    with pytest.raises(ValueError, match="StdScaling would change the mixture that CDFRecalibration was fitted to"):
        calibrate(once, (x[CALIBRATION], y[CALIBRATION]), StdScaling())


def test_a_recalibration_of_version_0_1_gives_what_it_gave(regressor, tmp_path):
    """The artifact holds knots and values of the empirical distribution; version 0.1 read them as written out here."""
    predict, x, y = regressor
    made = calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), CDFRecalibration())
    method = made.likelihood.method
    u = predict(x[CALIBRATION], samples=True).cdf(y[CALIBRATION]).double().flatten().unique()
    inside = u[(u > 0) & (u < 1)]
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    method.knots = torch.cat((zero, inside, one))
    method.values = torch.cat((zero, torch.arange(1, len(inside) + 1).double() / (len(inside) + 1), one))
    method.slopes = method.offset = None
    made.save(tmp_path / "m")
    found, before = vbdl.load(tmp_path / "m", compile=False)(x[TEST], samples=True), predict(x[TEST], samples=True)
    knots, values = method.knots.numpy(), method.values.numpy()
    np.testing.assert_allclose(found.cdf(y[TEST]), np.interp(before.cdf(y[TEST]), knots, values), rtol=1e-6)
    level = float(np.interp(0.2, values, knots))
    np.testing.assert_allclose(found.quantile(0.2), before.quantile(level), rtol=1e-4, atol=1e-5)
    place = np.searchsorted(knots, before.cdf(y[TEST]).double().numpy(), side="right").clip(1, len(knots) - 1)
    slope = (np.diff(values) / np.diff(knots))[place - 1]
    np.testing.assert_allclose(
        found.log_prob(y[TEST]),
        before.log_prob(y[TEST]).numpy() + np.log(slope).sum(1),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("method", [AbsoluteIntervals(0.1), NormalizedIntervals(0.1), CQR(0.1)])
def test_intervals_cover(method, regressor):
    predict, x, y = regressor
    p = calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), method)(x[TEST])
    covered = metrics.covered(p.lower, p.upper, y[TEST])
    assert covered.shape == (600, 2)
    # 600 test and 500 calibration rows: three standard deviations of the coverage are 0.055
    assert bool(((covered.mean(0) - 0.9).abs() < 0.055).all())


def test_the_action_travels_with_the_predictor(classifier, rows):
    x, y = rows
    calibrated = calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), Temperature())
    cost = 1 - torch.eye(3)
    deciding = with_decision(calibrated, ExpectedCost(cost, 0.3))
    p = deciding(x[TEST])
    assert torch.equal(p.action, ExpectedCost(cost, 0.3)(calibrated(x[TEST])))
    assert 0 < int((p.action == REFER).sum()) < 600
    rule = Referral().for_capacity(calibrated(x[CALIBRATION]), 0.2)
    assert torch.equal(with_decision(calibrated, rule)(x[TEST]).action, rule(calibrated(x[TEST])))
    with pytest.raises(ValueError, match="already has a decision"):
        with_decision(deciding, rule)
    with pytest.raises(ValueError, match="calibrate it first"):
        calibrate(deciding, (x[CALIBRATION], y[CALIBRATION]), Temperature())


def test_predictions_with_further_fields_are_pickled(classifier, rows):
    x, y = rows
    conformal = calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), ConformalSets(0.1))
    p = with_decision(conformal, Referral("confidence", 0.2))(x[TEST])
    for found in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p)):
        assert type(found) is type(p) and torch.equal(found.sets, p.sets) and torch.equal(found.action, p.action)
        assert torch.equal(found.label, p.label)


def test_a_row_does_not_depend_on_its_batch(classifier, rows):
    x, y = rows
    deciding = with_decision(
        calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), Temperature("probs")), Referral("total", 0.6)
    )
    together = deciding(x[TEST])
    alone = deciding(x[850:851])
    assert torch.equal(alone.probs[0], together.probs[50]) and alone.action[0] == together.action[50]


def test_refusals(classifier, regressor, rows):
    x, y = rows
    with pytest.raises(TypeError, match="Predictor"):
        calibrate(_mlp(3), (x, y), Temperature())
    with pytest.raises(TypeError, match="calibrator"):
        calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no rows"):
        calibrate(classifier, (x[:0], y[:0]), Temperature())
    with pytest.raises(ValueError, match="targets"):
        calibrate(classifier, (x[CALIBRATION], y[:10]), Temperature())
    with pytest.raises(ValueError, match="class 2 .* has no row"):
        keep = (y != 2).nonzero().squeeze(1)
        keep = keep[keep >= 300]
        calibrate(classifier, (x[keep], y[keep]), Isotonic())
    for method in (StdScaling(), CDFRecalibration(), AbsoluteIntervals(0.1), NormalizedIntervals(0.1), CQR(0.1)):
        with pytest.raises(ValueError, match=f"{type(method).__name__} is for regressions"):
            calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), method)
    predict, x_of, y_of = regressor
    with pytest.raises(ValueError, match="ConformalSets is for classes"):
        calibrate(predict, (x_of[CALIBRATION], y_of[CALIBRATION]), ConformalSets(0.1))
    with pytest.raises(ValueError, match="not finite"):
        calibrate(classifier, (x[CALIBRATION] * float("nan"), y[CALIBRATION]), Temperature())


@pytest.mark.slow
def test_calibration_and_action_compile(classifier, rows):
    x, y = rows
    calibrated = calibrate(classifier, (x[CALIBRATION], y[CALIBRATION]), Isotonic())
    both = with_decision(
        calibrate(calibrated, (x[CALIBRATION], y[CALIBRATION]), ConformalSets(0.1)), Referral("total", 0.6)
    )
    eager, compiled = both(x[TEST]), both.replace(compile=True)(x[TEST])
    np.testing.assert_allclose(compiled.probs, eager.probs, atol=1e-5)
    assert float((compiled.sets != eager.sets).double().mean()) < 0.01
    assert float((compiled.action != eager.action).double().mean()) < 0.01


def test_the_form_of_version_0_1_still_works_and_says_what_to_write(classifier, rows):
    predict, x, y = classifier, rows[0][CALIBRATION], rows[1][CALIBRATION]
    new = calibrate(predict, (x, y), Temperature())
    for old in (
        lambda: calibrate(predict, x, y, Temperature()),
        lambda: calibrate(predict, x, y, method=Temperature(), allow_overlap=False),
        lambda: calibrate(predictor=predict, x=x, y=y, method=Temperature()),
    ):
        with pytest.warns(DeprecationWarning, match=r"write calibrate\(predictor, \(x, y\), method\)") as warned:
            calibrated = old()
        assert warned[0].filename == __file__  # at the line to change
        assert torch.equal(calibrated(x).probs, new(x).probs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(predict, data=(x, y), method=Temperature())
    with pytest.raises(TypeError, match=r"as a pair \(x, y\), got Tensor"):
        calibrate(predict, x, Temperature())
