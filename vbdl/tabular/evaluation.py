"""Evaluation of a predictor on unseen rows: scores with 95 % intervals, beside those of the simplest predictor."""

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from vbdl import metrics
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.normal_mixture import RegressionPrediction
from vbdl.metrics.estimate import Interval
from vbdl.tabular.target import Target
from vbdl.types import Json, Prediction

_RESAMPLES = 500


class ClassShares(TypedDict):
    """The simplest predictor of classes: the share of each class in the training rows."""

    shares: list[float]


class MeanAndStd(TypedDict):
    """The simplest predictor of numbers: the mean and the standard deviation of the training rows' targets."""

    mean: float
    std: float


Baseline = ClassShares | MeanAndStd
"""The simplest predictor, which gives every row the same prediction."""


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval, and the score of the simplest predictor.

    The simplest predictor is a `Baseline`.
    """

    name: str
    unit: str
    value: float
    lower: float
    upper: float
    simplest: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """All scores of a predictor on some rows."""

    rows: int
    scores: tuple[Score, ...]

    def __getitem__(self, name: str) -> Score:
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(f"there is no score {name!r}; there are {[s.name for s in self.scores]}")

    def to_dict(self) -> Json:
        """Return the scores as a dict for JSON; numbers that are not finite become None."""
        return {
            "rows": self.rows,
            "scores": {
                s.name: {
                    "unit": s.unit,
                    **{k: _plain(v) for k, v in (("value", s.value), ("lower", s.lower), ("upper", s.upper))},
                    **({} if s.simplest is None else {"simplest": _plain(s.simplest)}),
                }
                for s in self.scores
            },
        }

    def __str__(self) -> str:
        lines = [f"{'':24s} {'value':>10s}   {'95 % interval':>24s} {'simplest':>10s}"]
        for s in self.scores:
            simplest = "" if s.simplest is None else f"{s.simplest:10.4g}"
            between = f"[{s.lower:.4g}, {s.upper:.4g}]"
            lines.append(f"{s.name:24s} {s.value:10.4g}   {between:>24s} {simplest:>10s} {s.unit}")
        return "\n".join([*lines, f"on {self.rows} rows"])


def evaluate(predictor: Predictor, x: Tensor, y: Tensor, target: Target, base: Baseline | None = None) -> Evaluation:
    """Score a predictor on (x, y), beside the simplest predictor `base` of the training rows if it is given."""
    if len(y) < 2:
        raise ValueError(f"an evaluation needs at least two rows, there are {len(y)}")
    if target.classes is not None:
        return Evaluation(len(y), tuple(_classification(predictor(x), y, target, base)))
    return Evaluation(len(y), tuple(_regression(predictor(x, samples=True), y, target, base)))


def _classification(p: Prediction, y: Tensor, target: Target, base: Baseline | None) -> list[Score]:
    if p.probs is None:
        raise ValueError(f"the target {target.name} has classes, and the model predicts numbers")
    probs = p.probs.double()
    probs = probs / probs.sum(1, keepdim=True)
    simplest: dict[str, float] = {}
    if base is not None and "shares" in base:
        shares = torch.tensor(base["shares"], dtype=torch.float64).expand_as(probs)
        simplest = {
            "accuracy": metrics.accuracy(shares, y),
            "NLL": float(metrics.categorical_nll(shares, y).mean()),
            "Brier": float(metrics.brier_score(shares, y).mean()),
        }
    nll, brier = metrics.categorical_nll(probs, y), metrics.brier_score(probs, y)
    scores = [
        _score("accuracy", "share of rows", metrics.accuracy_interval(probs, y), simplest.get("accuracy")),
        _score("NLL", "nats a row", _nll_interval(nll), simplest.get("NLL")),
        _score("Brier", "0 to 2", metrics.mean_estimate(brier).interval(), simplest.get("Brier")),
        _score("ECE", "15 bins", metrics.bootstrap(metrics.ece, probs, y, n_resamples=_RESAMPLES)),
    ]
    if probs.shape[1] == 2 and 2 <= int(y.sum()) <= len(y) - 2:  # an interval needs two rows of each class
        scores.insert(
            1, _score("AUROC", f"for {target.label(1)!r}", metrics.auroc_interval(probs[:, 1], y.bool()), 0.5)
        )
    if p.sets is not None:
        hit = p.sets.gather(1, y.unsqueeze(1)).squeeze(1)
        held = metrics.proportion_interval(int(hit.sum()), len(y))
        scores.append(_score("set coverage", "share of rows", held))
        scores.append(_score("set size", "classes", metrics.mean_estimate(p.sets.sum(1).double()).interval()))
    return scores


def _regression(p: Prediction, y: Tensor, target: Target, base: Baseline | None) -> list[Score]:
    mean, truth = p.mean.double().flatten(), y.double().flatten()
    nll = -p.log_prob(y).double()
    simplest: dict[str, float] = {}
    if base is not None and "mean" in base:
        center, spread = torch.full_like(truth, base["mean"]), torch.full_like(truth, base["std"])
        simplest = {
            "RMSE": metrics.rmse(center, truth),
            "NLL": float(metrics.gaussian_nll(center, spread, truth).mean()),
            "CRPS": float(metrics.crps_gaussian(center, spread, truth).mean()),
        }
    unit = f"of {target.name}"
    low, high = p.interval(0.9)
    hit = metrics.covered(low.double().flatten(), high.double().flatten(), truth)
    scores = [
        _score(
            "RMSE", unit, metrics.bootstrap(metrics.rmse, mean, truth, n_resamples=_RESAMPLES), simplest.get("RMSE")
        ),
        _score("NLL", "nats a row", _nll_interval(nll), simplest.get("NLL")),
        _score("90 % coverage", "share of rows", metrics.proportion_interval(int(hit.sum()), len(truth))),
    ]
    # samples belong to the mixture before recalibration, whose CRPS is not that of the recalibrated prediction
    if isinstance(p, RegressionPrediction) and p.recalibration is None:
        assert p.samples is not None
        components = p.samples.double()
        crps = metrics.crps_mixture(components[..., 0, 0], (0.5 * components[..., 0, 1]).exp(), truth)
        scores.insert(2, _score("CRPS", unit, metrics.mean_estimate(crps).interval(), simplest.get("CRPS")))
    if p.lower is not None and p.upper is not None:
        hit = metrics.covered(p.lower.double().flatten(), p.upper.double().flatten(), truth)
        held = metrics.proportion_interval(int(hit.sum()), len(y))
        scores.append(_score("interval coverage", "share of rows", held))
        width = (p.upper - p.lower).double().flatten()
        if bool(width.isfinite().all()):
            scores.append(_score("interval width", unit, metrics.mean_estimate(width).interval()))
    return scores


def _nll_interval(nll: Tensor) -> Interval:
    """Return the interval of the mean NLL; infinite if a row has probability 0, as after isotonic calibration."""
    if bool(nll.isposinf().any()):
        return Interval(math.inf, math.inf, math.inf, 0.95)
    return metrics.mean_estimate(nll).interval()


def _score(name: str, unit: str, interval: Interval, simplest: float | None = None) -> Score:
    return Score(name, unit, interval.value, interval.lower, interval.upper, simplest)


def _plain(value: float) -> float | None:
    return value if value - value == 0 else None
