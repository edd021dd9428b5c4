import inspect
import json
import math

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from vbdl import calibration, metrics
from vbdl.calibration import (
    BBQ,
    Beta,
    Dirichlet,
    EnsembleTemperature,
    Histogram,
    Isotonic,
    MatrixScaling,
    Platt,
    Temperature,
    VectorScaling,
)

ON_PROBS = [
    lambda: Temperature("probs"),
    EnsembleTemperature,
    Dirichlet,
    Platt,
    Beta,
    Histogram,
    lambda: Histogram(7, "mass"),
    Isotonic,
    BBQ,
]
ON_LOGITS = [Temperature, VectorScaling, MatrixScaling]


def _overconfident(n=1500, classes=4, factor=2.5, seed=0, samples=None):
    """Logits that are `factor` times too large for the labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 1.5
    y = torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)
    if samples is None:
        return z * factor, y
    noise = torch.randn(samples, n, classes, generator=generator, dtype=torch.float64)
    return z * factor + noise, y


def _nll(probs, y):
    return float(metrics.categorical_nll(probs, y).mean())


def test_every_calibrator_says_where_it_acts():
    listed = {type(make()).__name__ for make in ON_PROBS + ON_LOGITS}
    public = {
        name
        for name, thing in vars(calibration).items()
        if inspect.isclass(thing) and getattr(thing, "acts_on", "") != "prediction"
        # acts_on is set in __init__ where it can be chosen
        if hasattr(thing, "acts_on") or "acts_on" in inspect.signature(thing).parameters
    }
    assert listed == public
    assert all(make().acts_on == "probs" for make in ON_PROBS)
    assert all(make().acts_on == "logits" for make in ON_LOGITS)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5, 40.0])
def test_temperature_is_the_minimum_of_a_scalar_search(factor):
    logits, y = _overconfident(factor=factor)
    best = optimize.minimize_scalar(
        lambda t: _nll((logits / math.exp(t)).softmax(1), y),
        bounds=(-5, 5),
        method="bounded",
        options={"xatol": 1e-10},
    )
    fitted = Temperature().fit(logits, y)
    assert fitted.temperature == pytest.approx(math.exp(best.x), rel=1e-6)
    assert fitted.temperature == pytest.approx(factor, rel=0.2)


def test_float32_fit_is_the_float64_fit():
    # netcal returns T = 1 in float32
    logits, y = _overconfident()
    low, high = Temperature().fit(logits.float(), y), Temperature().fit(logits, y)
    assert low.temperature == pytest.approx(high.temperature, rel=1e-6)
    exact = Temperature().fit(logits.float().double(), y)
    assert low.temperature == exact.temperature
    for make in (VectorScaling, MatrixScaling):
        a, b = make().fit(logits.float(), y), make().fit(logits, y)
        np.testing.assert_allclose(a.weight, b.weight, atol=1e-5)


def test_temperature_on_probs_is_temperature_on_logits_for_one_sample():
    logits, y = _overconfident()
    on_logits, on_probs = Temperature().fit(logits, y), Temperature("probs").fit(logits.softmax(1), y)
    assert on_probs.temperature == pytest.approx(on_logits.temperature, rel=1e-7)
    np.testing.assert_allclose(on_probs(logits.softmax(1)), on_logits(logits).softmax(1), rtol=1e-6, atol=1e-12)
    p = logits[:, :2].softmax(1)
    binary = Temperature("probs").fit(p, y % 2)
    np.testing.assert_allclose(binary(p[:, 1]), binary(p)[:, 1], rtol=1e-10)


def test_temperature_of_an_ensemble_fits_the_mean_of_its_members():
    # torch-uncertainty refuses ensembles
    logits, y = _overconfident(samples=6)
    loss = lambda t: _nll((logits / t).softmax(2).mean(0), y)
    fitted = Temperature().fit(logits, y)
    here = loss(fitted.temperature)
    assert here < loss(1.0) - 0.01
    assert here <= min(loss(fitted.temperature * f) for f in (0.99, 0.999, 1.001, 1.01))
    np.testing.assert_allclose(fitted(logits), logits / fitted.temperature, rtol=1e-12)


def test_temperature_never_changes_the_most_probable_class():
    logits, y = _overconfident()
    for dtype in (torch.float32, torch.float64):
        z = logits.to(dtype)
        cal = Temperature().fit(z, y)
        assert torch.equal(cal(z).argmax(1), z.argmax(1))
        p = z.softmax(1)
        for make in (lambda: Temperature("probs"), EnsembleTemperature):
            assert torch.equal(make().fit(p, y)(p).argmax(1), p.argmax(1))


def test_temperature_is_blind_to_a_shift_of_each_row():
    logits, y = _overconfident()
    shifted = logits + torch.linspace(-500, 500, 1500)[:, None]
    assert Temperature().fit(shifted, y).temperature == pytest.approx(
        Temperature().fit(logits, y).temperature, rel=1e-7
    )


def test_rows_that_are_all_right_end_at_the_limit_with_a_warning():
    logits = torch.eye(3, dtype=torch.float64) * 2
    with pytest.warns(UserWarning, match="all these rows are predicted correctly"):
        fitted = Temperature().fit(logits, torch.arange(3))
    assert fitted.temperature == pytest.approx(1e-3)
    with pytest.warns(UserWarning, match="no better than by chance, and every probability becomes about 1/classes"):
        one = Temperature().fit(logits[:1], torch.tensor([1]))
    assert one.temperature == pytest.approx(1e3)


@pytest.mark.parametrize("make", ON_PROBS + ON_LOGITS)
def test_calibration_helps_on_new_rows(make):
    calibrator = make()
    logits, y = _overconfident(6000, seed=1)
    x = logits if calibrator.acts_on == "logits" else logits.softmax(1)
    calibrator.fit(x[:3000], y[:3000])
    after = calibrator(x[3000:])
    after = after.softmax(1) if calibrator.acts_on == "logits" else after
    before = logits[3000:].softmax(1)
    np.testing.assert_allclose(after.sum(1), torch.ones(3000), rtol=1e-12)
    assert metrics.ece(before, y[3000:]) > 0.15
    assert metrics.ece(after, y[3000:]) < 0.06
    assert float(metrics.brier_score(after, y[3000:]).mean()) < float(metrics.brier_score(before, y[3000:]).mean())


@pytest.mark.parametrize("make", [Temperature, VectorScaling, MatrixScaling, Dirichlet, EnsembleTemperature, Beta])
def test_fitting_lowers_the_likelihood_loss_on_its_own_rows(make):
    # Beta only promises it in one binary problem
    calibrator = make()
    logits, y = _overconfident(classes=2 if make is Beta else 4)
    x = logits if calibrator.acts_on == "logits" else logits.softmax(1)
    after = calibrator.fit(x, y)(x)
    after = after.softmax(1) if calibrator.acts_on == "logits" else after
    assert _nll(after, y) < _nll(logits.softmax(1), y) - 1e-3


@pytest.mark.parametrize("make", ON_PROBS)
def test_binary_as_one_column_or_two_is_the_same(make):
    logits, y = _overconfident(classes=2)
    p = logits.softmax(1)
    two, one = make().fit(p, y), make().fit(p[:, 1], y)
    np.testing.assert_allclose(two(p)[:, 1], one(p[:, 1]), rtol=1e-6, atol=1e-9)
    assert one(p[:, 1]).shape == (1500,)


@pytest.mark.parametrize("make", ON_PROBS)
def test_exact_zeros_and_ones_stay_finite(make):
    row = torch.arange(60)
    probs, y = torch.eye(3)[row % 3], (row + (row % 5 == 0)) % 3
    q = make().fit(probs, y)(probs)
    assert q.dtype == torch.float32 and bool(q.isfinite().all())
    np.testing.assert_allclose(q.sum(1), torch.ones(60), atol=1e-6)


@pytest.mark.parametrize("make", ON_PROBS + ON_LOGITS)
def test_what_is_refused(make):
    calibrator = make()
    logits, y = _overconfident(30)
    x = logits if calibrator.acts_on == "logits" else logits.softmax(1)
    nan = x.clone()
    nan[2, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite value in row"):
        make().fit(nan, y)
    with pytest.raises(ValueError, match="no rows"):
        make().fit(x[:0], y[:0])
    with pytest.raises(ValueError, match="one label per row"):
        make().fit(x, y[:-1])
    with pytest.raises(ValueError, match="outside the 4 classes"):
        make().fit(x, y + 3)
    if calibrator.acts_on == "probs":
        with pytest.raises(ValueError, match="outside|sums to"):
            make().fit(logits, y)
    if not isinstance(calibrator, (Temperature, EnsembleTemperature)):
        with pytest.raises(ValueError, match="class 3 .* has no row"):
            make().fit(x[y != 3], y[y != 3])
        with pytest.raises(RuntimeError, match="fit first"):
            make()(x)
    else:
        make().fit(x[y != 3], y[y != 3])  # needs no class in particular


@pytest.mark.parametrize("make", ON_PROBS + ON_LOGITS)
def test_state_moves_and_comes_back(make):
    calibrator = make()
    logits, y = _overconfident(300)
    x = logits if calibrator.acts_on == "logits" else logits.softmax(1)
    expected = calibrator.fit(x, y)(x)
    state = calibrator.state_dict()
    assert state
    back = make()
    for name, value in state.items():
        back.register_buffer(name, value)
    assert torch.equal(back(x), expected)
    assert calibrator(x.float()).dtype == torch.float32
    np.testing.assert_allclose(calibrator(x.float()), expected, atol=2e-5)


def test_one_calibrated_row_does_not_depend_on_the_batch():
    logits, y = _overconfident(200)
    p = logits.softmax(1)
    for make in ON_PROBS:
        calibrator = make().fit(p, y)
        np.testing.assert_allclose(calibrator(p[7:8]), calibrator(p)[7:8], rtol=1e-12)


def test_isotonic_is_sklearns_with_ties_and_weights():
    rng = np.random.default_rng(0)
    for n in (1, 2, 30, 3000):
        p = rng.integers(1, 40, n) / 40
        label = (rng.random(n) < p**2).astype(int)
        if n > 1:
            label[:2] = 0, 1
        weights = rng.random(n) + 0.1
        x, value = calibration.isotonic.isotonic_knots(p, label.astype(float), weights)
        sklearn = IsotonicRegression(out_of_bounds="clip").fit(p, label, weights)
        grid = np.linspace(0, 1, 997)
        np.testing.assert_allclose(np.interp(grid, x, value), sklearn.predict(grid), atol=1e-12)
        if n > 1:
            ours = Isotonic().fit(torch.from_numpy(p), torch.from_numpy(label), torch.from_numpy(weights))
            np.testing.assert_allclose(ours(torch.from_numpy(grid)), sklearn.predict(grid), atol=1e-12)
            assert (np.diff(ours(torch.from_numpy(grid))) >= 0).all()


def test_isotonic_pools_equal_probabilities():
    # scipy alone answers [0, .5, .5] for the ties {0, 1, 0}
    x, value = calibration.isotonic.isotonic_knots(np.array([0.5] * 3), np.array([0.0, 1, 0]))
    assert x.tolist() == [0.5] and value.tolist() == [pytest.approx(1 / 3)]


def test_platt_without_smoothing_is_logistic_regression():
    logits, y = _overconfident(classes=2)
    p = logits.softmax(1)[:, 1]
    z = (logits[:, 1] - logits[:, 0]).numpy()[:, None]
    sklearn = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(z, y)
    ours = Platt(smoothed=False).fit(p, y)
    assert float(ours.slope) == pytest.approx(sklearn.coef_[0, 0], rel=1e-4)
    assert float(ours.intercept) == pytest.approx(sklearn.intercept_[0], abs=1e-4)


def test_smoothed_platt_meets_platts_targets():
    p, y = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.9], dtype=torch.float64), torch.tensor([0, 0, 1, 0, 1])
    fitted = Platt().fit(p, y)
    # two positives of five: 3/4 for them, 1/5 for the others; the gradient of the loss vanishes
    residual = fitted(p) - torch.where(y == 1, 3 / 4, 1 / 5)
    assert abs(float(residual.sum())) < 1e-6 and abs(float((residual * p.logit()).sum())) < 1e-6
    apart = Platt().fit(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
    assert bool(torch.stack((apart.slope, apart.intercept)).isfinite().all())


def test_beta_recovers_its_own_curve_and_stays_monotone():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=generator, dtype=torch.float64)
    truth = torch.sigmoid(0.5 * p.log() - 2.0 * (1 - p).log() + 0.3)
    y = (torch.rand(p.shape, generator=generator, dtype=torch.float64) < truth).long()
    ours = Beta().fit(p, y)
    np.testing.assert_allclose(ours.coefficients[0], [0.5, 2.0, 0.3], atol=0.05)
    reversed_ = Beta().fit(p, 1 - y)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert bool((reversed_(grid).diff() >= -1e-12).all())


def test_histogram_by_hand():
    p = torch.tensor([0.05, 0.1, 0.15, 0.95, 1.0], dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 0])
    width = Histogram(10).fit(p, y)
    # 0.1 is in the first bin; empty bins give their midpoint
    expected = [0.5, 0.5, 0.0, 0.25, 0.5]
    asked = torch.tensor([0.0, 0.1, 0.2, 0.25, 0.97], dtype=torch.float64)
    np.testing.assert_allclose(width(asked), expected, atol=1e-15)
    mass = Histogram(2, "mass").fit(p, y)
    # two rows below the cut at 0.125, three above
    np.testing.assert_allclose(mass(torch.tensor([0.12, 0.13])), [0.5, 1 / 3], atol=1e-7)


def test_rows_that_every_map_sends_to_zero_keep_their_probabilities():
    probs = torch.tensor([[0.4, 0.3, 0.3]] * 3 + [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]])
    y = torch.tensor([1, 2, 0, 0, 1, 2])
    calibrator = Histogram(2).fit(probs, y)
    calibrator.values.zero_()
    np.testing.assert_allclose(calibrator(probs), probs)


def _bbq_reference(p, y, x):
    """The paper's average written out: every histogram, its evidence, its value at x."""
    from scipy.special import gammaln

    n, order = len(p), np.argsort(p, kind="stable")
    s, h = p[order], y[order]
    scores, values = [], []
    for bins in range(max(1, int(n ** (1 / 3) // 10)), min(n, math.ceil(10 * n ** (1 / 3))) + 1):
        cuts = [b * n // bins for b in range(1, bins)]
        edges = sorted({(s[c - 1] + s[c]) / 2 for c in cuts})
        ends = [0.0, *edges, 1.0]
        log_evidence, value = 0.0, None
        for low, high in zip(ends[:-1], ends[1:], strict=True):
            inside = (s > low) & (s <= high) if low else s <= high
            size, k = inside.sum(), h[inside].sum()
            prior = 2 / (len(ends) - 1)
            a = prior * (low + high) / 2
            b = prior - a
            log_evidence += (
                gammaln(prior)
                - gammaln(prior + size)
                + gammaln(k + a)
                - gammaln(a)
                + gammaln(size - k + b)
                - gammaln(b)
            )
            if (low < x <= high) or (x == 0 and low == 0):
                value = (k + a) / (size + prior)
        scores.append(log_evidence)
        values.append(value)
    weights = np.exp(np.array(scores) - max(scores))
    return float((weights / weights.sum()) @ values)


def test_bbq_is_the_weighted_average_of_the_paper():
    rng = np.random.default_rng(1)
    p = rng.integers(1, 50, 80) / 50  # with ties
    y = (rng.random(80) < p).astype(int)
    ours = BBQ().fit(torch.from_numpy(p), torch.from_numpy(y))
    for x in (0.0, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0):
        value = float(ours(torch.tensor([x], dtype=torch.float64)))
        assert value == pytest.approx(_bbq_reference(p, y, x), rel=1e-6)


def test_odir_holds_the_matrix_back():
    logits, y = _overconfident(400, 6)
    free, held = MatrixScaling(0.0).fit(logits, y), MatrixScaling(100.0).fit(logits, y)
    off = ~torch.eye(6, dtype=torch.bool)
    assert float(held.weight[off].abs().max()) < 0.1 * float(free.weight[off].abs().max())
    # the diagonal is not held: it becomes the inverse temperature
    assert float(held.weight.diagonal().mean()) == pytest.approx(0.4, rel=0.2)


def test_dirichlet_is_matrix_scaling_of_log_p():
    logits, y = _overconfident(500)
    log_p = logits.log_softmax(1)
    dirichlet, matrix = Dirichlet().fit(log_p.exp(), y), MatrixScaling().fit(log_p, y)
    np.testing.assert_allclose(dirichlet(log_p.exp()), matrix(log_p).softmax(1), atol=1e-6)


def test_vector_scaling_recovers_its_own_map():
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(40_000, 3, generator=generator, dtype=torch.float64)
    weight, bias = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3, 0.0, -0.3])
    y = torch.multinomial((z * weight + bias).softmax(1), 1, generator=generator).squeeze(1)
    fitted = VectorScaling().fit(z, y)
    np.testing.assert_allclose(fitted.weight, weight, atol=0.06)
    # the bias is known up to a constant
    np.testing.assert_allclose(fitted.bias - fitted.bias.mean(), bias, atol=0.06)


@pytest.fixture(scope="module")
def cifar(data_dir):
    folder = data_dir / "cifar_probs"
    arrays = np.load(folder / "cifar10_test_probs.npz")
    reference = json.loads((folder / "reference_metrics_computed_here.json").read_text())["metrics"]
    return arrays, torch.from_numpy(arrays["y"].astype(np.int64)), reference


def test_temperatures_of_seventeen_real_networks(cifar):
    arrays, y, reference = cifar
    names = [name for name in arrays.files if name != "y"]
    assert len(names) == 17
    for name in names:
        probs, row = torch.from_numpy(arrays[name]), reference[f"cifar10/{name}"]
        fitted = Temperature("probs").fit(probs[:5000], y[:5000])
        assert fitted.temperature == pytest.approx(row["T_first5k"], rel=1e-4)
        after = fitted(probs[5000:])
        assert abs(metrics.ece(after, y[5000:]) - row["ece15_last5k_after"]) < 0.0015
        assert _nll(after, y[5000:]) == pytest.approx(row["nll_last5k_after"], rel=1e-5)
        assert metrics.accuracy(after, y[5000:]) == metrics.accuracy(probs[5000:], y[5000:])


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Temperature("probs"), Histogram, Isotonic, Beta])
def test_forward_compiles_whole(make):
    logits, y = _overconfident(100)
    p = logits.softmax(1).float()
    calibrator = make().fit(p, y)
    compiled = torch.compile(calibrator, fullgraph=True)
    np.testing.assert_allclose(compiled(p), calibrator(p), rtol=1e-5, atol=1e-7)
