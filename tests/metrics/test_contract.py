"""What every metric promises: a stream that merges to the whole, an interval, and the same words for bad input."""

import math
from pathlib import Path

import pytest
import torch

from vbdl import metrics
from vbdl.calibration import (
    BBQ,
    CQR,
    AbsoluteIntervals,
    Beta,
    CDFRecalibration,
    ConformalSets,
    Dirichlet,
    EnsembleTemperature,
    Histogram,
    Isotonic,
    MatrixScaling,
    NormalizedIntervals,
    Platt,
    StdScaling,
    Temperature,
    VectorScaling,
)

N = 120
G = torch.Generator().manual_seed(0)
PROBS = torch.randn(N, 4, generator=G, dtype=torch.float64).mul(2).softmax(1)
Y = torch.multinomial(PROBS, 1, generator=G).squeeze(1)
SAMPLES = torch.randn(6, N, 2, generator=G, dtype=torch.float64)
STDS = 0.2 + torch.rand(6, N, 2, generator=G, dtype=torch.float64)
TARGET = torch.randn(N, 2, generator=G, dtype=torch.float64)
U, WRONG = torch.rand(N, generator=G, dtype=torch.float64), torch.rand(N, generator=G) < 0.3
LOWER, UPPER = TARGET - 0.5, TARGET + torch.randn(N, 2, generator=G, dtype=torch.float64).abs() - 0.3


def _rows(score, *arguments):
    """A score of rows: (batch,), or of rows and outputs, averaged over outputs."""
    return lambda *rows: (s := score(*rows)).reshape(s.shape[0], -1).mean(1)


def _first(score, count):
    """A score whose first `count` arguments have the samples in front, for accumulators that take the batch first."""
    return lambda *rows: score(*(r.movedim(1, 0) for r in rows[:count]), *rows[count:])


ROWS = (PROBS, Y)
STREAMS = {
    "NLL": (metrics.Mean(metrics.categorical_nll), ROWS),
    "NLL of a Gaussian": (metrics.Mean(metrics.gaussian_nll), (SAMPLES[0], STDS[0], TARGET)),
    "NLL of a mixture": (
        metrics.Mean(_first(metrics.mixture_nll, 2)),
        (SAMPLES.movedim(0, 1), STDS.movedim(0, 1), TARGET),
    ),
    "Brier": (metrics.Mean(metrics.brier_score), ROWS),
    "Brier's parts": (metrics.BrierDecomposition(), ROWS),
    "CRPS": (metrics.Mean(_rows(metrics.crps_gaussian)), (SAMPLES[0], STDS[0], TARGET)),
    "CRPS of a mixture": (
        metrics.Mean(_rows(_first(metrics.crps_mixture, 2))),
        (SAMPLES.movedim(0, 1), STDS.movedim(0, 1), TARGET),
    ),
    "CRPS of samples": (metrics.Mean(_rows(_first(metrics.crps_samples, 1))), (SAMPLES.movedim(0, 1), TARGET)),
    "energy score": (metrics.Mean(_first(metrics.energy_score, 1)), (SAMPLES.movedim(0, 1), TARGET)),
    "ECE": (metrics.CalibrationError(), ROWS),
    "ECE of equal mass": (metrics.Rows(lambda p, y: metrics.ece(p, y, binning="mass")), ROWS),
    "ECE sweep": (metrics.Rows(metrics.ece_sweep), ROWS),
    "class-wise ECE": (metrics.ClasswiseCalibrationError(), ROWS),
    "joint ECE": (metrics.JointCalibrationError(), ROWS),
    "debiased": (metrics.Rows(metrics.debiased_calibration_error), ROWS),
    "MCE": (metrics.Rows(metrics.mce), ROWS),
    "SKCE": (metrics.Rows(metrics.skce), ROWS),
    "AUROC": (metrics.Rows(metrics.auroc), (U, WRONG.long())),
    "AUPR": (metrics.Rows(metrics.aupr), (U, WRONG.long())),
    "FPR95": (metrics.Rows(metrics.fpr_at_tpr), (U, WRONG.long())),
    "AURC": (metrics.Rows(metrics.aurc), (U, WRONG)),
    "E-AURC": (metrics.Rows(metrics.excess_aurc), (U, WRONG)),
    "risk at coverage": (metrics.Rows(lambda u, w: metrics.risk_at_coverage(u, w, 0.5)), (U, WRONG)),
    "coverage at risk": (metrics.Rows(lambda u, w: metrics.coverage_at_risk(u, w, 0.3)), (U, WRONG)),
    "accuracy": (metrics.Mean(metrics.correct), ROWS),
    "squared error": (metrics.Mean(metrics.squared_error), (SAMPLES[0], TARGET)),
    "RMSE": (metrics.Rows(metrics.rmse), (SAMPLES[0], TARGET)),
    "coverage": (metrics.Mean(_rows(metrics.covered)), (LOWER, UPPER.maximum(LOWER), TARGET)),
    "width": (metrics.Rows(metrics.interval_width), (LOWER, UPPER.maximum(LOWER))),
    "interval score": (
        metrics.Mean(_rows(lambda lo, up, y: metrics.interval_score(lo, up, y, 0.1))),
        (LOWER, UPPER.maximum(LOWER), TARGET),
    ),
    "sharpness": (metrics.Rows(metrics.sharpness), (STDS[0],)),
    "quantile calibration": (metrics.QuantileCalibration(), (U,)),
    "diversity": (
        metrics.Rows(lambda p, y: metrics.diversity(p.movedim(1, 0), y).disagreement),
        (torch.stack((PROBS, PROBS.roll(1, 0)), 1), Y),
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_batches_merged_are_the_whole(name):
    whole, rows = STREAMS[name]
    whole.reset()
    whole.update(*rows)
    expected = float(whole.compute())
    parts = []
    for cut in (slice(0, 50), slice(50, 51), slice(51, N)):
        whole.reset()
        whole.update(*(r[cut] for r in rows))
        state = type(whole)(whole.score) if isinstance(whole, metrics.Mean) else None
        state = state or (type(whole)(whole.metric) if isinstance(whole, metrics.Rows) else type(whole)())
        parts.append(state.merge(whole))
    a, b, c = parts
    assert float(a.merge(b).merge(c).compute()) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    whole.reset()
    with pytest.raises(ValueError, match="no rows yet"):
        whole.compute()


@pytest.mark.parametrize("name", STREAMS)
def test_an_interval_on_request(name):
    """Means by Student's t, everything else by the bootstrap of the rows kept."""
    stream, rows = STREAMS[name]
    stream.reset()
    stream.update(*rows)
    value = stream.compute()
    if isinstance(stream, metrics.Mean):
        interval = value.interval()
    elif isinstance(stream, metrics.Rows):
        interval = stream.interval(n_resamples=40 if name == "SKCE" else 100)
    else:

        def metric(*r):
            stream.reset()
            stream.update(*r)
            return float(stream.compute())

        interval = metrics.bootstrap(metric, *rows, n_resamples=100)
    assert interval.lower < interval.upper and interval.value == pytest.approx(float(value), rel=1e-12)


def test_every_public_metric_is_in_the_table():
    used = {
        "Mean", "Rows", "Estimate", "Interval", "Comparison", "block_interval", "bootstrap", "compare", "mean_estimate",
        "proportion_interval", "as_torchmetric", "BrierParts", "Diversity", "Reliability", "RiskCoverage",
    }  # fmt: skip
    same = {  # the whole-set form of a stream above, its interval, or what it is made of
        "brier_decomposition", "ece", "mce", "classwise_ece", "joint_ece", "accuracy", "accuracy_interval",
        "auroc_interval", "interval_coverage", "quantile_calibration_error", "gaussian_cdf", "mixture_cdf",
        "median_distance", "risk_coverage",
    }  # fmt: skip
    source = Path(__file__).read_text()
    for name in (n for n in vars(metrics) if not n.startswith("_")):
        if callable(getattr(metrics, name)) and name not in used | same:
            assert f"metrics.{name}" in source, f"{name} has no stream and interval in this table"


def test_ece_sweep_is_the_largest_count_in_order():
    def loop(probs, y):
        confidence, label = probs.max(1)
        hit, found = (label == y).double(), 0.0
        order = confidence.argsort()
        for bins in range(1, len(y) + 1):
            parts = [order[(torch.arange(len(y)) * bins // len(y)) == b] for b in range(bins)]
            frequency = [float(hit[p].mean()) for p in parts if len(p)]
            if any(b < a for a, b in zip(frequency, frequency[1:], strict=False)):
                return found
            found = sum(abs(float((confidence[p] - hit[p]).sum())) for p in parts) / len(y)
        return found

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        probs = torch.randn(200, 3, generator=generator, dtype=torch.float64).mul(2).softmax(1)
        y = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        assert metrics.ece_sweep(probs, y) == pytest.approx(loop(probs, y), abs=1e-12)
    assert metrics.ece_sweep(PROBS[:1], PROBS[:1].argmax(1)) == pytest.approx(1 - float(PROBS[0].max()))


# -- bad input: a clear error, or an exact value

OF_PROBS = {
    name: lambda p, y, s=stream: (s.reset(), s.update(p, y), s.compute())[-1]
    for name, (stream, rows) in STREAMS.items()
    if rows is ROWS
}


@pytest.mark.parametrize("name", OF_PROBS)
def test_bad_probabilities_and_labels(name):
    nan, unnormalized, negative = PROBS.clone(), PROBS.clone(), PROBS.clone()
    nan[3, 1] = math.nan
    unnormalized[4] *= 1.1
    negative[5, :2] += torch.tensor([-1.0, 1.0])
    for bad, said in ((nan, "row 3"), (unnormalized, "row 4 of probs sums to"), (negative, "row 5")):
        with pytest.raises(ValueError, match=said):
            OF_PROBS[name](bad, Y)
    with pytest.raises(ValueError, match="outside the 4 classes"):
        OF_PROBS[name](PROBS, Y + 4)


@pytest.mark.parametrize("name", OF_PROBS)
def test_no_row_and_one_row(name):
    with pytest.raises(ValueError, match="no rows"):
        OF_PROBS[name](PROBS[:0], Y[:0])
    if name == "SKCE":
        with pytest.raises(ValueError, match="at least two rows"):
            OF_PROBS[name](PROBS[:1], Y[:1])
    else:
        assert math.isfinite(float(OF_PROBS[name](PROBS[:1], Y[:1])))


def test_constant_scores_are_exact():
    constant, labels = torch.full((N,), 0.3, dtype=torch.float64), WRONG.long()
    share = float(labels.double().mean())
    assert metrics.auroc(constant, labels) == 0.5
    assert metrics.aupr(constant, labels) == pytest.approx(share, rel=1e-15)
    assert metrics.fpr_at_tpr(constant, labels) == 1.0
    assert metrics.aurc(constant, WRONG) == pytest.approx(share, rel=1e-12)
    assert metrics.coverage_at_risk(constant, WRONG, share - 1e-6) == 0.0
    with pytest.raises(ValueError, match="bandwidth"):
        metrics.skce(PROBS[:1].repeat(9, 1), Y[:9])


CLASSIFICATION = [Temperature, lambda: Temperature("probs"), EnsembleTemperature, VectorScaling, MatrixScaling]
CLASSIFICATION += [Dirichlet, Platt, Beta, Histogram, Isotonic, BBQ, lambda: ConformalSets(0.1)]


@pytest.mark.filterwarnings("ignore:the temperature ended at its limit")
@pytest.mark.parametrize("make", CLASSIFICATION, ids=lambda m: type(m()).__name__)
def test_calibrators_on_one_row_and_on_constant_probabilities(make):
    """One row of two classes misses a class; constant probabilities are a map of one point: the frequency there."""
    x = torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    calibrator = make()
    outputs = x.log() if calibrator.acts_on == "logits" else x
    if isinstance(calibrator, Temperature | EnsembleTemperature | ConformalSets):
        assert bool(torch.isfinite(calibrator.fit(outputs, torch.tensor([1]))(outputs).double()).all())
    else:
        with pytest.raises(ValueError, match="class 0 .* has no row"):
            calibrator.fit(outputs, torch.tensor([1]))
    y = torch.tensor([1] * 30 + [0] * 10)
    found = make().fit(outputs.repeat(40, 1), y)(outputs)
    if isinstance(calibrator, ConformalSets):
        assert found.tolist() == [[True, True]]  # one score for each class: neither can be left out
    else:
        probs = found.softmax(1) if calibrator.acts_on == "logits" else found
        # Platt's and BBQ's priors count as further rows, ODIR pulls the intercept, and one temperature is one number
        slack = {"Platt": 0.02, "BBQ": 0.03, "MatrixScaling": 0.02, "Dirichlet": 0.02}.get(
            type(calibrator).__name__, 2e-5
        )
        assert float(probs[0, 1]) == pytest.approx(0.75, abs=slack)


def test_regression_calibrators_on_no_row_and_one():
    none, one, y = torch.zeros(0), torch.zeros(1), torch.ones(1)
    with pytest.raises(ValueError, match="no rows"):
        StdScaling().fit(none, none, none)
    assert StdScaling().fit(one, one + 2, y).scale == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no rows"):
        CDFRecalibration().fit(none)
    assert float(CDFRecalibration().fit(torch.tensor([0.2]))(torch.tensor(0.2))) == pytest.approx(0.5)
    for make, arguments in ((AbsoluteIntervals, 1), (NormalizedIntervals, 2), (CQR, 2)):
        for rows in (none, one):
            inputs = [rows, rows + 1][:arguments]
            lower, upper = make(0.1).fit(*inputs, rows)(*[torch.zeros(3), torch.ones(3)][:arguments])
            assert bool((lower == -math.inf).all() and (upper == math.inf).all())
