"""Calibrators, decisions and predictions written from `vbdl.types` alone: used everywhere like those of vbdl.

The classes are here, at the top level of this file; nothing else in the repository knows them.
"""

import copy
import dataclasses
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import vbdl
from vbdl import calibration, decision
from vbdl.batch.output import fields as columns_of
from vbdl.tabular.evaluation import evaluate
from vbdl.tabular.target import Target
from vbdl.types import Calibrator, Decision, Likelihood, Prediction

ROWS, CALIBRATION = 240, slice(0, 160)


class Sharpened(Calibrator):
    """Logits times the best of a few factors."""

    acts_on = "logits"
    factor: Tensor

    def __init__(self, candidates: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0)):
        super().__init__()
        self.candidates = tuple(candidates)
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))

    def fit(self, logits: Tensor, y: Tensor) -> "Sharpened":
        def nll(factor: float) -> float:
            return float(-(logits * factor).softmax(-1).mean(0).gather(1, y[:, None]).log().mean())

        self.factor = torch.tensor(min(self.candidates, key=nll), dtype=torch.float64)
        return self

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor.to(logits.dtype)


class Blended(Calibrator):
    """Probabilities mixed with chance, so that the mean confidence is the accuracy."""

    acts_on = "probs"
    share: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("share", torch.zeros((), dtype=torch.float64))

    def fit(self, probs: Tensor, y: Tensor) -> "Blended":
        chance = 1 / probs.shape[1]
        confidence, accuracy = probs.amax(1).mean().double(), (probs.argmax(1) == y).double().mean()
        self.share = ((confidence - accuracy) / (confidence - chance)).clamp(0, 1)
        return self

    def forward(self, probs: Tensor) -> Tensor:
        mixed = (1 - self.share) * probs.double() + self.share / probs.shape[1]
        return mixed.to(probs.dtype)


class TopClasses(Calibrator):
    """As many of the most probable classes as held the true one in a share of the calibration rows."""

    of_classes = True
    size: Tensor

    def __init__(self, coverage: float = 0.9):
        super().__init__()
        self.coverage = coverage
        self.register_buffer("size", torch.ones((), dtype=torch.int64))

    def fit_prediction(self, prediction: Prediction, y: Tensor) -> "TopClasses":
        assert prediction.probs is not None
        rank = (prediction.probs > prediction.probs.gather(1, y[:, None])).sum(1)
        self.size = 1 + rank.double().quantile(self.coverage).ceil().long()
        return self

    def fields(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        rank = fields["probs"].argsort(1, descending=True).argsort(1)
        return {**fields, "sets": rank < self.size}


class Widened(Calibrator):
    """Variances times one factor, of every draw too."""

    needs_samples = True
    changes_samples = True
    factor: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))

    def fit_prediction(self, prediction: Prediction, y: Tensor) -> "Widened":
        assert prediction.samples is not None
        mean = prediction.samples[..., 0].mean(0)
        self.factor = ((y - mean).square().mean() / prediction.total.mean()).double()
        return self

    def fields(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        wider = {n: fields[n] * self.factor.to(fields[n].dtype) for n in ("total", "aleatoric", "epistemic")}
        return {**fields, **wider}

    def samples(self, samples: Tensor) -> Tensor:
        mean, log_variance = samples.unbind(-1)
        center, factor = mean.mean(0), self.factor.to(mean.dtype)
        return torch.stack((center + factor.sqrt() * (mean - center), log_variance + factor.log()), -1)


class Band(Calibrator):
    """mean ± the largest error of the calibration rows."""

    width: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("width", torch.zeros(()))

    def fit_prediction(self, prediction: Prediction, y: Tensor) -> "Band":
        self.width = (y - prediction.mean).abs().amax()
        return self

    def fields(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**fields, "lower": fields["mean"] - self.width, "upper": fields["mean"] + self.width}


class Cautious(Decision):
    """The label, or -1 below a confidence."""

    def __init__(self, confidence: float = 0.6):
        super().__init__()
        self.confidence = confidence

    @property
    def caution(self) -> str | None:
        return "nothing is ever that sure: every row is refused" if self.confidence > 1 else None

    def forward(self, prediction) -> Tensor:
        sure = prediction.probs.amax(-1) >= self.confidence
        return torch.where(sure, prediction.label, -1)


class Worst(Decision):
    """The 10 % quantile of the calibrated predictive, and whether it is below a limit."""

    reads_distribution = True

    def __init__(self, limit: float = 0.0):
        super().__init__()
        self.limit = limit

    def forward(self, prediction) -> dict[str, Tensor]:
        worst = prediction.distribution.quantile(0.1)
        return {"action": (worst < self.limit).squeeze(1).long(), "risk": worst.squeeze(1)}


class Negative(Decision):
    """The probability of a negative number, draw by draw."""

    reads_draws = True

    def per_draw(self, parameters: Tensor) -> Tensor:
        mean, log_variance = parameters.unbind(-1)
        return torch.special.ndtr(-mean / (0.5 * log_variance).exp()).squeeze(-1)

    def forward(self, prediction) -> dict[str, Tensor]:
        calibrated = prediction.distribution
        if calibrated is None:
            risk = prediction.per_draw.double()
        else:
            each = torch.special.ndtr(-calibrated.mean / calibrated.std).squeeze(-1)
            risk = (each * calibrated.weights[:, None]).sum(0)
        return {"action": (risk > 0.5).long(), "risk": risk}


@dataclass(frozen=True, kw_only=True)
class CountPrediction(Prediction):
    """A mixture of Poisson distributions."""

    mean: Tensor

    @property
    def std(self) -> Tensor:
        return self.total.sqrt()

    def log_prob(self, y: Tensor) -> Tensor:
        assert self.samples is not None
        each = torch.distributions.Poisson(self.samples.exp()).log_prob(y).flatten(2).sum(2)
        return each.logsumexp(0) - torch.tensor(float(len(each))).log()


class Poisson(Likelihood):
    """Counts; the network returns the log of the rate. Variances in squared counts."""

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs

    def check_targets(self, y: Tensor, parameters_shape) -> Tensor:
        if tuple(y.shape) != tuple(parameters_shape):
            raise ValueError(f"counts {tuple(y.shape)} do not fit {tuple(parameters_shape)}")
        return y.float()

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        return -torch.distributions.Poisson(parameters.exp(), validate_args=False).log_prob(y).flatten(1).sum(1)

    def summarize(self, parameters: Tensor) -> dict[str, Tensor]:
        rate = parameters.exp()
        n = torch.full((), float(len(rate)), device=rate.device)
        return {"n": n, "mean": rate.mean(0), "square": rate.square().mean(0)}

    def merge(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        n = a["n"] + b["n"]
        return {"n": n, **{k: (a["n"] * a[k] + b["n"] * b[k]) / n for k in ("mean", "square")}}

    def finish(self, summary: dict[str, Tensor]) -> dict[str, Tensor]:
        mean = summary["mean"]
        epistemic = (summary["square"] - mean.square()).clamp_min(0)
        return {"mean": mean, "total": mean + epistemic, "aleatoric": mean, "epistemic": epistemic}

    def prediction(self, fields: dict[str, Tensor], n_samples: int, samples: Tensor | None = None) -> CountPrediction:
        return CountPrediction(**fields, n_samples=n_samples, samples=samples)


def _ensemble(outputs: int, likelihood: Likelihood) -> vbdl.Predictor:
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs)))
        members[-1][2].weight.data.mul_(4)
    return vbdl.Predictor(vbdl.DeepEnsemble(members), likelihood, compile=False)


def _rows() -> Tensor:
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(3))


def _classes() -> tuple[vbdl.Predictor, Tensor, Tensor]:
    predict, x = _ensemble(3, vbdl.Categorical()), _rows()
    torch.manual_seed(4)
    return predict, x, torch.multinomial(predict(x).probs.sqrt(), 1).squeeze(1)  # less sure than the network says


def _numbers() -> tuple[vbdl.Predictor, Tensor, Tensor]:
    predict, x = _ensemble(1, vbdl.Gaussian(std=0.2)), _rows()
    torch.manual_seed(4)
    return predict, x, predict(x).mean + torch.randn(ROWS, 1)


CALIBRATORS = {
    "own logits": (Sharpened, _classes),
    "own probs": (Blended, _classes),
    "own sets": (TopClasses, _classes),
    "own variances": (Widened, _numbers),
    "own intervals": (Band, _numbers),
    "Temperature": (calibration.Temperature, _classes),
    "Platt": (calibration.Platt, _classes),
    "ConformalSets": (lambda: calibration.ConformalSets(0.1), _classes),
    "StdScaling": (calibration.StdScaling, _numbers),
    "AbsoluteIntervals": (lambda: calibration.AbsoluteIntervals(0.1), _numbers),
}
DECISIONS = {  # made for predictions, with thresholds between two of them
    "own classes": (lambda p: Cautious(float(p.confidence.quantile(0.5))), _classes),
    "own distribution": (lambda p: Worst(), _numbers),
    "own draws": (lambda p: Negative(), _numbers),
    "Referral": (lambda p: decision.Referral("total", float(p.total.quantile(0.5))), _classes),
    "ExpectedCost": (
        lambda p: decision.ExpectedCost(1 - torch.eye(3), 1 - float(p.confidence.quantile(0.5))),
        _classes,
    ),
    "Risk": (lambda p: decision.Risk(), _numbers),
    "HandOver": (lambda p: decision.HandOver((0.3, 0.3), (0.6, 0.6), bounds=decision.PathBounds(0.0)), _numbers),
}


def _tensors(prediction: Prediction) -> dict[str, Tensor]:
    return {n: value for n, value in vars(prediction).items() if isinstance(value, Tensor)}


def _check_everywhere(predict: vbdl.Predictor, x: Tensor, y: Tensor) -> Prediction:
    """What every predictor promises, whoever wrote its parts; the prediction."""
    prediction = predict(x)
    torch.testing.assert_close(prediction.total, prediction.aleatoric + prediction.epistemic, rtol=1e-5, atol=1e-6)
    values = prediction.values()
    assert all(len(value) == ROWS for value in values.values())
    # the same for a row by itself, for draws one by one, for copies
    new = slice(CALIBRATION.stop, None)  # the scores of calibration rows are thresholds of conformal sets, to rounding
    for rows, other in ((slice(200, 201), predict), (new, predict.replace(chunk_size=1))):
        for name, value in other(x[rows]).values().items():
            torch.testing.assert_close(value, values[name][rows], rtol=1e-4, atol=1e-5, equal_nan=True)
    for again in (copy.deepcopy(predict), pickle.loads(pickle.dumps(predict))):
        assert {n: t.tolist() for n, t in _tensors(again(x)).items()} == {
            n: t.tolist() for n, t in _tensors(prediction).items()
        }
    again = pickle.loads(pickle.dumps(prediction))
    assert type(again) is type(prediction) and torch.equal(again.total, prediction.total)
    # what files are written from
    columns = columns_of(prediction, None, None, 0)
    assert {"total", "aleatoric", "epistemic"} <= {*columns}
    assert ("set" in columns) == (prediction.sets is not None)
    assert ("lower" in columns) == (prediction.lower is not None)
    assert ("action" in columns) == (prediction.action is not None)
    # what it is scored by
    target = Target(name="y", reason="", classes=None if y.is_floating_point() else ("a", "b", "c"))
    scores = {score.name: score.value for score in evaluate(predict, x, y, target).scores}
    assert ("set coverage" in scores) == (prediction.sets is not None)
    assert ("interval coverage" in scores) == (prediction.lower is not None)
    return prediction


# those of vbdl, which pass the same line by line, are in the tests of calibration and of artifacts by default
@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.slow_where(cell=lambda p: not p["name"].startswith("own"))
def test_a_calibrator(name):
    make, data = CALIBRATORS[name]
    predict, x, y = data()
    method = make()
    calibrated = vbdl.calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), method)
    assert method.state_dict().keys() == make().state_dict().keys()  # it is copied, and stays unfitted
    for key, value in make().state_dict().items():
        assert torch.equal(method.state_dict()[key], value)
    prediction = _check_everywhere(calibrated, x, y)
    assert calibrated.likelihood.n_rows == 160 and calibrated.likelihood.n_overlap == 0
    if prediction.sets is not None or prediction.lower is not None:
        torch.testing.assert_close(prediction.total, predict(x).total)  # it adds, and changes nothing
    else:
        nll = [float(-p(x, samples=True).log_prob(y).mean()) for p in (predict, calibrated)]
        assert nll[1] < nll[0]
    decided = vbdl.with_decision(predict, _Nothing())
    with pytest.raises(ValueError, match="already has a decision, on uncalibrated predictions: calibrate it first"):
        vbdl.calibrate(decided, (x, y), make())


class _Nothing(nn.Module):
    """A decision may be a plain module too."""

    def forward(self, prediction) -> Tensor:
        return torch.zeros(len(prediction.total), dtype=torch.int64)


# those of vbdl without a calibration are in tests/decision/test_calibrated_decisions.py by default
@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.slow_where(cell=lambda p: not p["calibrated"] and not p["name"].startswith("own"))
def test_a_decision(name, calibrated):
    make, data = DECISIONS[name]
    predict, x, y = data()
    if calibrated:
        method = Sharpened() if data is _classes else Widened()
        predict = vbdl.calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), method)
    deciding = vbdl.with_decision(predict, make(predict(x)))
    prediction = _check_everywhere(deciding, x, y)
    assert prediction.action is not None and len(prediction.action.unique()) > 1
    for field, value in _tensors(predict(x)).items():
        assert torch.equal(getattr(prediction, field), value)  # it adds, and changes nothing


def test_own_decisions_read_the_calibrated_predictive():
    predict, x, y = _numbers()
    for calibrated in (predict, vbdl.calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), Widened())):
        p = calibrated(x, samples=True)
        worst = vbdl.with_decision(calibrated, Worst())(x)
        torch.testing.assert_close(worst.risk, p.quantile(0.1).squeeze(1).double(), rtol=1e-4, atol=1e-4)
        below = p.cdf(torch.zeros(ROWS, 1)).squeeze(1).double()
        negative = vbdl.with_decision(calibrated, Negative())(x)
        torch.testing.assert_close(negative.risk, below, rtol=1e-4, atol=1e-5)


def test_a_decisions_caution_is_a_warning():
    predict, _, _ = _classes()
    with pytest.warns(UserWarning, match="every row is refused"):
        vbdl.with_decision(predict, Cautious(1.1))


def test_a_prediction_of_ones_own():
    predict, x = _ensemble(1, Poisson()), _rows()
    torch.manual_seed(4)
    y = torch.poisson(predict(x).mean)
    prediction = predict(x, samples=True)
    assert type(prediction) is CountPrediction and prediction.probs is None and prediction.label is None
    assert set(prediction.values()) == {"mean", "std", "total", "aleatoric", "epistemic"}
    torch.testing.assert_close(prediction.log_prob(y), predict.log_prob(x, y), rtol=1e-4, atol=1e-4)
    assert {*columns_of(prediction, None, None, 0)} == {"mean", "std", "total", "aleatoric", "epistemic"}
    with pytest.raises(NotImplementedError, match="CountPrediction has no intervals"):
        columns_of(prediction, None, ["lower"], 0.9)
    with pytest.raises(ValueError, match="have no 'probabilities'"):
        columns_of(prediction, None, ["probabilities"], 0)
    # calibrated and decided, fields are added to its own class
    banded = vbdl.calibrate(predict, (x[CALIBRATION], y[CALIBRATION]), Band())
    deciding = vbdl.with_decision(banded, decision.AnomalyFlags(0.1, "total").fit(prediction.total[:, 0]))
    added = deciding(x)
    assert type(added) is CountPrediction and added.lower is not None and added.action is not None
    torch.testing.assert_close(added.mean, prediction.mean)
    with pytest.raises(ValueError, match="is for classes"):
        vbdl.calibrate(predict, (x, y), TopClasses())
    with pytest.raises(TypeError, match="needs a RegressionPrediction"):
        shift = calibration.CDFRecalibration().fit_scores(torch.randn(50))
        calibration.CalibratedLikelihood(Poisson(), shift, 50, 0).prediction(
            {n: t for n, t in _tensors(predict(x)).items()}, 3
        )
    q = vbdl.MCDropout(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)))
    history = vbdl.fit(q, (x, y), Poisson(), epochs=2, compile=False, progress=False)
    assert history.epochs == 2 and bool(vbdl.Predictor(q, Poisson(), 4, compile=False)(x).mean.isfinite().all())


def test_what_a_calibrator_does_not_define_is_named():
    predict, x, y = _numbers()
    method = Calibrator()
    with pytest.raises(NotImplementedError, match="Calibrator needs a method fit_prediction"):
        vbdl.calibrate(predict, (x, y), method)
    method.acts_on = "weights"
    with pytest.raises(TypeError, match="must be a calibrator of"):
        vbdl.calibrate(predict, (x, y), method)
    method.acts_on = "probs"
    predict, x, y = _classes()
    with pytest.raises(NotImplementedError, match='Calibrator acts on "probs" and needs a method fit'):
        vbdl.calibrate(predict, (x, y), method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        predict(x).total = y
