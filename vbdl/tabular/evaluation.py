"""Evaluation of a predictor on unseen rows: scores with 95 % intervals, beside those of the simplest predictor."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat, TypedDict

import torch
from torch import Tensor

from vbdl import metrics
from vbdl.calibration.calibrated import calibrations
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.normal_mixture import RegressionPrediction
from vbdl.metrics.estimate import Interval
from vbdl.tabular.target import Target
from vbdl.types import Json

_RESAMPLES = 500
_BLOCKS = 20  # of consecutive rows in time, whose scores are taken as independent


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
    wanted: float | None = None  # the coverage that calibration aimed at


@dataclass(frozen=True)
class Evaluation:
    """All scores of a predictor on some rows."""

    rows: int
    scores: tuple[Score, ...]
    blocks: int | None = None  # of consecutive rows in time, by which the intervals were computed

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
        how = f"; intervals by {self.blocks} blocks of consecutive rows in time" if self.blocks else ""
        lines.append(f"on {self.rows} rows{how}")
        if any(s.simplest is not None for s in self.scores):
            lines.append("simplest: every row gets the mean and std, or the class shares, of the training rows")
        lines += [f"note:   {note}" for note in self.notes()]
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Sentences for the user about scores that are worse than they should be."""
        notes = []
        for s in self.scores:
            if s.name in ("RMSE", "NLL") and s.simplest is not None and s.value > s.simplest:
                notes.append(f"{s.name} is worse than that of the simplest predictor: these inputs do not help")
            if s.wanted is not None and s.upper < s.wanted:
                notes.append(
                    f"{s.name} is below the {s.wanted:.0%} it was calibrated for: these rows differ from the "
                    f"calibration rows, so calibrate on newer ones (vbdl calibrate)"
                )
        return notes


def evaluate(
    predictor: Predictor,
    x: Tensor,
    y: Tensor,
    target: Target,
    base: Baseline | None = None,
    when: Tensor | None = None,
) -> Evaluation:
    """Score a predictor on (x, y), beside the simplest predictor `base` of the training rows if it is given.

    when: (rows,) the order of the rows in time. Rows near in time are alike, and intervals then widen for it.
    """
    if len(y) < 2:
        raise ValueError(f"an evaluation needs at least two rows, there are {len(y)}")
    blocks = None
    if when is not None and len(y) >= 2 * _BLOCKS:
        order, blocks = when.argsort(stable=True), _BLOCKS
        x, y = x[order], y[order]
    intervals = _Intervals(blocks)
    if target.classes is not None:
        return Evaluation(len(y), tuple(_classification(predictor, x, y, target, base, intervals)), blocks)
    return Evaluation(len(y), tuple(_regression(predictor, x, y, target, base, intervals)), blocks)


@dataclass(frozen=True)
class _Intervals:
    """The 95 % intervals of scores, of independent rows, or of rows in time by blocks of them."""

    blocks: int | None

    def mean(self, scores: Tensor) -> Interval:
        """Of the mean of (rows,) scores; infinite if one is, as an NLL after isotonic calibration."""
        if bool(scores.isposinf().any()):
            return Interval(math.inf, math.inf, math.inf, 0.95)
        if self.blocks is None:
            return metrics.mean_estimate(scores).interval()
        return metrics.block_interval(torch.mean, scores, blocks=self.blocks)

    def share(self, hits: Tensor) -> Interval:
        """Of the share of hits, (rows,) bool; never narrower than that of independent rows."""
        return self.widened(metrics.proportion_interval(int(hits.sum()), len(hits)), lambda h: h.double().mean(), hits)

    def widened(self, independent: Interval, metric: Callable[..., SupportsFloat], *rows: Tensor) -> Interval:
        """An interval for independent rows, as wide as blocks of rows make it, within [0, 1]."""
        if self.blocks is None:
            return independent
        found = metrics.block_interval(metric, *rows, blocks=self.blocks)
        lower, upper = min(independent.lower, found.lower), max(independent.upper, found.upper)
        return Interval(independent.value, max(0.0, lower), min(1.0, upper), independent.level)

    def of(self, metric: Callable[..., SupportsFloat], *rows: Tensor) -> Interval:
        """Of any metric that is not negative."""
        if self.blocks is None:
            return metrics.bootstrap(metric, *rows, n_resamples=_RESAMPLES)
        found = metrics.block_interval(metric, *rows, blocks=self.blocks)
        return Interval(found.value, max(0.0, found.lower), found.upper, found.level)


def _classification(
    predictor: Predictor, x: Tensor, y: Tensor, target: Target, base: Baseline | None, intervals: _Intervals
) -> list[Score]:
    p = predictor(x)
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
    accuracy = intervals.widened(metrics.accuracy_interval(probs, y), metrics.accuracy, probs, y)
    scores = [
        _score("accuracy", "share of rows", accuracy, simplest.get("accuracy")),
        _score("NLL", "nats a row", intervals.mean(nll), simplest.get("NLL")),
        _score("Brier", "0 to 2", intervals.mean(brier), simplest.get("Brier")),
        _score("ECE", "15 bins", intervals.of(metrics.ece, probs, y)),
    ]
    if probs.shape[1] == 2 and 2 <= int(y.sum()) <= len(y) - 2:  # an interval needs two rows of each class
        positive = y.bool()
        found = intervals.widened(metrics.auroc_interval(probs[:, 1], positive), _auroc_or_half, probs[:, 1], positive)
        scores.insert(1, _score("AUROC", f"for {target.label(1)!r}", found, 0.5))
    if p.sets is not None:
        hit = p.sets.gather(1, y.unsqueeze(1)).squeeze(1)
        scores.append(_score("set coverage", "share of rows", intervals.share(hit), wanted=_wanted(predictor)))
        scores.append(_score("set size", "classes", intervals.mean(p.sets.sum(1).double())))
    return scores


def _regression(
    predictor: Predictor, x: Tensor, y: Tensor, target: Target, base: Baseline | None, intervals: _Intervals
) -> list[Score]:
    p = predictor(x, samples=True)
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
        _score("RMSE", unit, intervals.of(metrics.rmse, mean, truth), simplest.get("RMSE")),
        _score("NLL", "nats a row", intervals.mean(nll), simplest.get("NLL")),
        _score("90 % coverage", "share of rows in the band of the model itself", intervals.share(hit)),
    ]
    # samples belong to the mixture before recalibration, whose CRPS is not that of the recalibrated prediction
    if isinstance(p, RegressionPrediction) and p.recalibration is None:
        assert p.samples is not None
        components = p.samples.double()
        crps = metrics.crps_mixture(components[..., 0, 0], (0.5 * components[..., 0, 1]).exp(), truth)
        scores.insert(2, _score("CRPS", unit, intervals.mean(crps), simplest.get("CRPS")))
    if p.lower is not None and p.upper is not None:
        hit = metrics.covered(p.lower.double().flatten(), p.upper.double().flatten(), truth)
        scores.append(
            _score(
                "interval coverage",
                "share of rows in the calibrated interval",
                intervals.share(hit),
                wanted=_wanted(predictor),
            )
        )
        width = (p.upper - p.lower).double().flatten()
        if bool(width.isfinite().all()):
            scores.append(_score("interval width", unit, intervals.mean(width)))
    return scores


def _auroc_or_half(scores: Tensor, positive: Tensor) -> float:
    """The AUROC, or 0.5 where all rows are of one class."""
    return metrics.auroc(scores, positive) if 0 < int(positive.sum()) < len(positive) else 0.5


def _wanted(predictor: Predictor) -> float | None:
    """The coverage that the predictor's sets or intervals were calibrated for."""
    for calibrated in calibrations(predictor.likelihood):
        if (alpha := getattr(calibrated.method, "alpha", None)) is not None:
            return 1 - alpha
    return None


def _score(
    name: str, unit: str, interval: Interval, simplest: float | None = None, wanted: float | None = None
) -> Score:
    return Score(name, unit, interval.value, interval.lower, interval.upper, simplest, wanted)


def _plain(value: float) -> float | None:
    return value if value - value == 0 else None
