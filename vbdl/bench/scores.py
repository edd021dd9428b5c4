"""The scores of a result with their intervals, over the splits if there are several, else over the rows."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import SupportsFloat

import torch
from torch import Tensor

from vbdl import metrics
from vbdl.bench.summary import EvaluatedRows
from vbdl.bench.task import Task
from vbdl.types import Json

LEVEL = 0.95
_RESAMPLES = 200


@dataclass
class Score:
    """A score with its 95 % confidence interval and unit."""

    value: float
    lower: float | None
    upper: float | None
    standard_error: float | None
    better: str  # "higher", "lower", or the best value as text, like "0.9"
    unit: str
    per_split: list[float] = field(default_factory=list)


def regression(task: Task, rows: EvaluatedRows) -> dict[str, Score]:
    """The scores of a regression: RMSE, log-likelihood, CRPS, coverage, quantile error and AURC."""
    nll, loss, crps, pit, total = _all(rows.nll, rows.loss, rows.crps, rows.pit, rows.total)
    inside = ((pit >= 0.05) & (pit <= 0.95)).double()
    scores = {
        "rmse": _score(lambda a: a.mean().sqrt(), "lower", "target units", loss),
        "ll": _score(lambda a: -a.mean(), "higher", "nats", nll),
        "crps": _score(lambda a: a.mean(), "lower", "target units", crps),
        "coverage90": _score(lambda a: a.mean(), "0.9", "share", inside),
        "quantile_error": _score(metrics.quantile_calibration_error, "lower", "share", pit),
        "aurc": _score(metrics.aurc, "lower", "squared target units", total, loss),
    }
    return scores


def classification(task: Task, rows: EvaluatedRows) -> dict[str, Score]:
    """The scores of a classification: accuracy, NLL, Brier, ECE, AURC; AUROC for two classes, cost if defined."""
    (_, y), probs = task.test, rows.probs
    assert probs is not None
    nll, loss, total = _all(rows.nll, rows.loss, rows.total)
    brier = torch.stack([metrics.brier_score(p, t) for p, t in zip(probs, y, strict=True)])
    scores = {
        "accuracy": _score(lambda a: 1 - a.mean(), "higher", "share", loss),
        "nll": _score(lambda a: a.mean(), "lower", "nats", nll),
        "brier": _score(lambda a: a.mean(), "lower", "", brier),
        "ece": _score(lambda p, t: metrics.ece(p, t), "lower", "share", probs, y),
        "aurc": _score(metrics.aurc, "lower", "share", total, loss),
        "error80": _score(lambda u, w: metrics.risk_at_coverage(u, w, 0.8), "lower", "share", total, loss),
    }
    if task.n_splits == 1:
        exact = metrics.accuracy_interval(probs[0], y[0], LEVEL)
        scores["accuracy"].lower, scores["accuracy"].upper = exact.lower, exact.upper
    if len(task.classes) == 2:
        scores["auroc"] = _area(probs[..., 1], y == 1)
    if task.cost is not None:
        cost = task.cost.double()
        action = (probs @ cost).argmin(-1)  # the action with the lowest expected cost
        scores["cost"] = _score(lambda a: a.mean(), "lower", "cost a row", cost[y, action])
    return scores


def out_of_distribution(inside: EvaluatedRows, outside: EvaluatedRows) -> dict[str, Score]:
    """The AUROC of each part of the uncertainty for telling out-of-distribution rows from test rows."""
    scores = {}
    for part in ("total", "epistemic"):
        a, b = vars(inside)[part], vars(outside)[part]
        if float(a.abs().max()) + float(b.abs().max()) < 1e-12:  # a single network has no epistemic part
            continue
        strange = torch.cat([torch.zeros_like(a), torch.ones_like(b)], dim=1).bool()
        scores[part] = _area(torch.cat([a, b], dim=1), strange)
    return scores


def _all(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    assert all(t is not None for t in tensors)
    return tensors  # type: ignore[return-value]


def _score(metric: Callable[..., SupportsFloat], better: str, unit: str, *rows: Tensor) -> Score:
    """The score of a metric of (splits, rows, ...) tensors; its interval is from the splits, or by resampling rows."""
    each = [float(metric(*rows_of_split)) for rows_of_split in zip(*rows, strict=True)]
    if len(each) > 1:
        return _over_splits(each, better, unit)
    interval = metrics.bootstrap(metric, *(t[0] for t in rows), n_resamples=_RESAMPLES, level=LEVEL)
    return Score(interval.value, interval.lower, interval.upper, None, better, unit, each)


def _area(scores: Tensor, positive: Tensor) -> Score:
    """The AUROC of (splits, rows) scores; every split must have both classes."""
    each = [metrics.auroc(s, p) for s, p in zip(scores, positive, strict=True)]
    if len(each) > 1:
        return _over_splits(each, "higher", "")
    interval = metrics.auroc_interval(scores[0], positive[0], LEVEL)
    return Score(interval.value, interval.lower, interval.upper, None, "higher", "", each)


def _over_splits(each: list[float], better: str, unit: str) -> Score:
    estimate = metrics.mean_estimate(torch.tensor(each, dtype=torch.float64))
    interval = estimate.interval(LEVEL)
    return Score(estimate.value, interval.lower, interval.upper, estimate.standard_error, better, unit, each)


def plain(scores: dict[str, Score]) -> dict[str, Json]:
    """The scores as dicts for JSON, in which numbers that are not finite are null."""
    return {name: {k: _finite(v) for k, v in asdict(s).items()} for name, s in scores.items()}


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value
