"""Evaluation of a trained method: scores, uncertainty on test and out-of-distribution rows, and speed."""

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vbdl import former, metrics
from vbdl.demo.training import SINGLE, Trained
from vbdl.demo.tutorial import loop
from vbdl.engine.predictor import Predictor
from vbdl.types import Prediction

ROWS = 64  # rows of a timed batch, and of a tile
BINS = 10  # bins of the calibration error


@dataclass
class Speed:
    """Rows per second of the tutorial loop and of vbdl, medians of alternating runs, and their outputs' difference."""

    loop: float
    vbdl: float
    compile_seconds: float
    agreement: float  # see `disagreement`


@dataclass
class Evaluated:
    """The evaluation of a method on a task; variances in squared target units, entropies in nats."""

    trained: Trained
    test: Prediction  # the prediction, with its samples
    ood: Prediction
    scores: dict[str, float] = field(default_factory=dict)
    speed: Speed | None = None


def predictor(trained: Trained, compile: bool, seed: int = 0) -> Predictor:
    """The predictor of a trained method."""
    tiles = (ROWS,)
    return Predictor(trained.posterior, trained.likelihood, trained.n_samples, seed, tiles=tiles, compile=compile)


def evaluate(trained: Trained, timed: bool = True) -> Evaluated:
    """Compute every score of the table. The timed predictor is compiled; the one for scores makes the same draws."""
    task, predict = trained.task, predictor(trained, compile=False)
    result = Evaluated(trained, predict(task.x["test"], samples=True), predict(task.x["ood"], samples=True))
    y = task.y["test"]
    if task.regression:
        result.scores = _regression_scores(result, y.flatten(), task.y_std)
    else:
        p = result.test.probs
        assert p is not None  # of classes
        result.scores = {
            "accuracy": metrics.accuracy(p, y),
            "nll": float(metrics.categorical_nll(p, y).mean()),
            "calibration": metrics.ece(p, y, BINS),
        }
    scale = task.y_std**2
    for name, prediction in (("test", result.test), ("ood", result.ood)):
        for part in ("total", "aleatoric", "epistemic"):
            result.scores[f"{name}_{part}"] = float(getattr(prediction, part).mean()) * scale
    uncertainty = "total" if trained.method == SINGLE else "epistemic"
    scores = [getattr(p, uncertainty).flatten() for p in (result.test, result.ood)]
    unknown = torch.cat([torch.zeros(len(scores[0])), torch.ones(len(scores[1]))]).bool()
    result.scores["auroc"] = (
        0.5 if trained.method == SINGLE and task.regression else metrics.auroc(torch.cat(scores), unknown)
    )
    if timed and trained.method != SINGLE:
        result.speed = speed(trained, predict)
    return result


def _regression_scores(result: Evaluated, y: Tensor, y_std: float) -> dict[str, float]:
    p = result.test
    return {
        "rmse": metrics.rmse(p.mean.flatten(), y) * y_std,
        "nll": float(-p.log_prob(y).mean()) + torch.tensor(y_std).log().item(),
        "calibration": metrics.quantile_calibration_error(p.cdf(y.unsqueeze(-1)).flatten()),
    }


def speed(trained: Trained, eager: Predictor, seconds: float = 1.0) -> Speed:
    """Time the compiled predictor and the tutorial loop in turn on one batch, after comparing their outputs."""
    x = trained.task.x["test"][:ROWS]
    compiled, tutorial = predictor(trained, compile=True), loop(trained)
    begun = time.perf_counter()
    first = compiled.warm_up((len(x),), example=x)(x)
    compile_seconds = time.perf_counter() - begun
    torch.testing.assert_close(first.total, eager(x).total, rtol=1e-4, atol=1e-5)
    agreement = disagreement(trained, x)
    draws = compiled.n_samples
    # both contenders also compute the mean and the split of the uncertainty
    end = trained.task.likelihood()
    contenders = {"loop": lambda: end.finish(end.summarize(tutorial(x, draws))), "vbdl": lambda: compiled(x)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end_at = time.perf_counter() + seconds
    with torch.no_grad():
        while time.perf_counter() < end_at or len(times["vbdl"]) < 5:
            for name, run in contenders.items():
                begun = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begun)
    rows = {name: len(x) / statistics.median(taken) for name, taken in times.items()}
    return Speed(rows["loop"], rows["vbdl"], compile_seconds, agreement)


def disagreement(trained: Trained, x: Tensor, n_samples: int = 500) -> float:
    """The distance between the samples of the loop and of vbdl: 0 if equal, about 1 if they differ by chance only.

    Root mean square over outputs of (difference of the two means) / (its standard error); for an ensemble, which has
    nothing random, the largest relative difference. Raises RuntimeError if they disagree, because then their times
    cannot be compared.
    """
    endless = trained.posterior.n_draws is None
    n_samples = trained.posterior.n_draws or n_samples
    settings = {"n_samples": n_samples, "compile": False}
    samples = predictor(trained, compile=False).replace(**settings)(x, samples=True).samples
    assert samples is not None  # samples=True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loop_samples = loop(trained)(x, n_samples)
    if trained.task.regression:
        samples, loop_samples = samples[..., 0], loop_samples[..., 0]
    if not endless:
        distance = float((samples - loop_samples).abs().max() / loop_samples.abs().max())
        agree = distance < 1e-4
    else:
        error = ((samples.var(0) + loop_samples.var(0)) / n_samples).sqrt().clamp_min(1e-12)
        distance = float(((samples.mean(0) - loop_samples.mean(0)) / error).square().mean().sqrt())
        spread = float((samples.std(0) / loop_samples.std(0).clamp_min(1e-12)).median())
        # all rows share a draw, so their differences are correlated: 2.5 instead of about 1 allows for that
        agree = distance < 2.5 and 0.9 < spread < 1.1
    if not agree:
        raise RuntimeError(
            f"{trained.task.name}, {trained.method}: the draws of the tutorial loop and of vbdl differ "
            f"({distance:.3g}), so their times cannot be compared: look for a bug in one of them"
        )
    return distance


__getattr__ = former.names(__name__, {"Result": "Evaluated"})
