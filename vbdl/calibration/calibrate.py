"""Calibrating a predictor on rows that its training never saw."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calibration.calibrated import CalibratedLikelihood
from vbdl.data import as_tensor
from vbdl.engine import Predictor
from vbdl.fingerprint import fingerprints
from vbdl.types import Inputs


def calibrate(
    predictor: Predictor,
    x: Inputs,
    y: Tensor,
    method: Any,
    *,
    allow_overlap: bool = False,
) -> Predictor:
    """A new predictor with the same draws, whose predictions are calibrated; the old one is not changed.

    Args:
        x, y: calibration rows, as for training. None of them may be a training row.
        method: a calibrator of vbdl.calibration, not fitted yet. It is copied, and fitted in float64. Temperature()
            and its kind act on each sample's logits, Temperature("probs") and the others on the mean
            probability; StdScaling on the variances, CDFRecalibration on
            quantiles and densities (of a prediction with samples=True); ConformalSets adds `sets` to predictions, and
            AbsoluteIntervals, NormalisedIntervals and CQR add `lower` and `upper`.
        allow_overlap: calibrate on training rows in spite of all. How many they were is recorded in the
            likelihood (n_overlap), and saved with it, as are the fingerprints of all of them (calibration_rows).

    Raises ValueError when rows were trained on (vbdl.fit records a fingerprint of each; a posterior that was
    trained in another way has none, and cannot be checked), and for data the method cannot be fitted to.
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(f"calibrate needs a Predictor, got {type(predictor).__name__}")
    acts_on = getattr(method, "acts_on", None)
    if not isinstance(method, nn.Module) or acts_on not in ("logits", "probs", "prediction"):
        raise TypeError(f"calibrate needs a calibrator of vbdl.calibration, got {type(method).__name__}")
    inner = predictor.likelihood
    if hasattr(inner, "decision"):
        raise ValueError("this predictor decides already, on uncalibrated numbers: calibrate first, decide after")
    while acts_on == "logits" and isinstance(inner, CalibratedLikelihood):
        if inner.method.acts_on != "logits":
            raise ValueError(
                f"{type(method).__name__} would change the samples that {type(inner.method).__name__} was "
                "fitted behind: calibrate logits first, the finished prediction after"
            )
        inner = inner.likelihood
    if acts_on == "prediction" and hasattr(method, "samples") and _recalibrated(predictor.likelihood):
        raise ValueError(
            f"{type(method).__name__} would change the mixture that CDFRecalibration was fitted to: use it first and "
            f"CDFRecalibration after, or CDFRecalibration alone, which corrects a wrong scale too"
        )
    x, y = as_tensor(x), torch.as_tensor(y, device=predictor.device)
    n_rows = y.shape[0] if y.ndim else 0
    if n_rows == 0:
        raise ValueError("there are no rows to calibrate on")
    rows = fingerprints(x)
    n_overlap = _overlap(predictor, rows)
    if n_overlap and not allow_overlap:
        raise ValueError(
            f"{n_overlap} of {n_rows} calibration rows were trained on, and would make the model look better than "
            "it is; use rows from vbdl.split, or allow_overlap=True, which is recorded"
        )
    needs_samples = acts_on == "logits" or hasattr(method, "samples") or hasattr(method, "needs_samples")
    # one that was warmed up compiles nothing more, so another with the same draws is asked
    source = predictor.replace() if predictor.sealed else predictor
    prediction = source(x, samples=needs_samples)
    shape = prediction.samples.shape[1:] if needs_samples else _parameter_shape(prediction)
    target = predictor.likelihood.check_targets(y, shape)
    fitted: Any = copy.deepcopy(method)
    if acts_on == "logits":
        _fit_logits(fitted, prediction, target)
    elif acts_on == "probs":
        _fit_probs(fitted, prediction, target)
    else:
        _check_kind(fitted, prediction)
        fitted.fit_prediction(prediction, target)
    fitted = fitted.to(predictor.device)
    before = copy.deepcopy(predictor.likelihood)
    likelihood: Any = CalibratedLikelihood(before, fitted, n_rows, n_overlap, rows.unique())
    return predictor.replace(likelihood=likelihood)


def _recalibrated(likelihood: Any) -> bool:
    """Whether a distribution function is bent somewhere in this likelihood."""
    while isinstance(likelihood, CalibratedLikelihood):
        if hasattr(likelihood.method, "wrap"):
            return True
        likelihood = likelihood.likelihood
    return False


def _overlap(predictor: Predictor, rows: Tensor) -> int:
    """How many rows, given by their fingerprints, were trained on."""
    # an ensemble of several architectures is trained as a whole, or part by part
    posterior = predictor.posterior
    seen = [trained.training_rows for trained in (posterior, *posterior.parts)]
    known = [trained for trained in seen if trained is not None]
    return int(torch.isin(rows, torch.cat(known)).sum()) if known else 0


def _parameter_shape(prediction: Any) -> tuple[int, ...]:
    """Shape of one sample's parameters, which likelihoods check targets against."""
    probs = getattr(prediction, "probs", None)
    return tuple(probs.shape) if probs is not None else (*prediction.mean.shape, 2)


def _check_kind(method: Any, prediction: Any) -> None:
    """ValueError where a method for classes meets a regression, or the other way round."""
    name, of_classes = type(method).__name__, getattr(method, "of_classes", False)
    if of_classes and not hasattr(prediction, "probs"):
        raise ValueError(f"{name} is for classes, and this is a regression: use AbsoluteIntervals, CQR or StdScaling")
    if of_classes and prediction.probs.ndim > 1 and prediction.total.shape == prediction.probs.shape:
        raise ValueError(
            f"{name} makes one set of classes a row, and this prediction answers {prediction.probs.shape[1:].numel()} "
            f"questions of yes or no (multi-label): take one question at a time, with p = predict(x) and "
            f"{name}(alpha).fit(p.probs[:, i], y[:, i].long())"
        )
    if not of_classes and hasattr(prediction, "probs"):
        raise ValueError(f"{name} is for regressions, and this predicts classes: use Temperature or ConformalSets")


def _fit_logits(method: Any, prediction: Any, y: Tensor) -> None:
    logits, probs = prediction.samples, getattr(prediction, "probs", None)
    if probs is None:
        raise ValueError(f"{type(method).__name__} calibrates class probabilities; for a regression use StdScaling")
    if logits.ndim == y.ndim + 1:
        if type(method).__name__ != "Temperature":
            raise ValueError(
                f"{type(method).__name__} needs a logit for each class, and this likelihood has one for yes and no: "
                "use Temperature or Platt"
            )
        # one logit l is the pair (0, l); dividing it by T is dividing both
        logits = logits.reshape(logits.shape[0], -1)
        logits = torch.stack((torch.zeros_like(logits), logits), dim=-1)
    method.fit(logits.reshape(logits.shape[0], -1, logits.shape[-1]), y.reshape(-1).long())


def _fit_probs(method: Any, prediction: Any, y: Tensor) -> None:
    probs = getattr(prediction, "probs", None)
    if probs is None:
        raise ValueError(f"{type(method).__name__} calibrates class probabilities; for a regression use StdScaling")
    flat = probs.reshape(-1) if probs.ndim == y.ndim else probs.reshape(-1, probs.shape[-1])
    method.fit(flat, y.reshape(-1).long())
