"""`vbdl.calibrate`: a calibrator fitted to a predictor, on rows that its training never saw."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
from torch import Tensor

from vbdl.calibration.calibrated import CalibratedLikelihood, calibrations, is_recalibrated
from vbdl.data.fingerprint import fingerprints
from vbdl.data.rows import as_tensor
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.around import Around
from vbdl.types import Calibrator, Inputs, Likelihood, Prediction

STAGES = ("logits", "probs", "prediction")
_P = ParamSpec("_P")


def _accepts_x_and_y(function: Callable[_P, Predictor]) -> Callable[_P, Predictor]:
    """The function, which also takes (predictor, x, y, method), the form of version 0.1, with a warning."""
    old_form = inspect.signature(lambda predictor, x, y, method, *, allow_overlap=False: None)
    new_form: Callable[..., Predictor] = function

    @functools.wraps(function)
    def either(*args, **kwargs):
        try:
            old = old_form.bind(*args, **kwargs).arguments
        except TypeError:
            return new_form(*args, **kwargs)
        warnings.warn(
            "calibrate(predictor, x, y, method) is deprecated: write calibrate(predictor, (x, y), method)",
            DeprecationWarning,
            stacklevel=2,
        )
        return new_form(data=(old.pop("x"), old.pop("y")), **old)

    return either


@_accepts_x_and_y
def calibrate(
    predictor: Predictor,
    data: tuple[Inputs, Tensor],
    method: Calibrator,
    *,
    allow_overlap: bool = False,
) -> Predictor:
    """Return a predictor with the same draws and calibrated predictions; the given one is not changed.

    Args:
        data: (x, y), calibration rows as for training. None of them may be a training row.
        method: a calibrator of vbdl.calibration, or one of your own (`vbdl.types.Calibrator`), not fitted yet. It is
            copied, and fitted in float64. Temperature() and its kind act on each sample's logits, Temperature("probs")
            and the others on the mean probability; StdScaling on the variances, CDFRecalibration on
            quantiles and densities (of a prediction with samples=True); ConformalSets adds `sets` to predictions, and
            AbsoluteIntervals, NormalizedIntervals and CQR add `lower` and `upper`.
        allow_overlap: calibrate on training rows in spite of all. How many they were is recorded in the
            likelihood (n_overlap), and saved with it, as are the fingerprints of all of them (calibration_rows).

    Raises ValueError when rows were trained on (vbdl.fit records a fingerprint of each; a posterior that was
    trained in another way has none, and cannot be checked), and for data the method cannot be fitted to.
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(f"calibrate needs a Predictor, got {type(predictor).__name__}")
    if not isinstance(method, Calibrator) or method.acts_on not in STAGES:
        raise TypeError(
            f"calibrate needs a calibrator of vbdl.calibration, or one of a class that inherits from "
            f"vbdl.types.Calibrator; got {type(method).__name__}"
        )
    if not isinstance(data, Sequence) or len(data) != 2:
        raise TypeError(f"calibrate needs the calibration rows as a pair (x, y), got {type(data).__name__}")
    x, y = data
    _check_order(predictor.likelihood, method)
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
    needs_samples = method.acts_on == "logits" or method.needs_samples
    # one that was warmed up compiles nothing more, so another with the same draws is asked
    source = predictor.replace() if predictor.sealed else predictor
    prediction = source(x, samples=needs_samples)
    target = predictor.likelihood.check_targets(y, prediction.parameters_shape)
    fitted = copy.deepcopy(method)
    if method.acts_on == "logits":
        _fit_logits(fitted, prediction, target)
    elif method.acts_on == "probs":
        _fit_probs(fitted, prediction, target)
    else:
        _check_kind(fitted, prediction)
        fitted.fit_prediction(prediction, target)
    fitted = fitted.to(predictor.device)
    before = copy.deepcopy(predictor.likelihood)
    return predictor.replace(likelihood=CalibratedLikelihood(before, fitted, n_rows, n_overlap, rows.unique()))


def _check_order(likelihood: Likelihood, method: Calibrator) -> None:
    """Raises ValueError if the method would change the inputs of a calibration or decision that is there already."""
    name = type(method).__name__
    if isinstance(likelihood, Around) and likelihood.decides:
        raise ValueError("this predictor decides already, on uncalibrated numbers: calibrate first, decide after")
    if method.acts_on == "logits":
        for calibrated in calibrations(likelihood):
            if calibrated.method.acts_on != "logits":
                raise ValueError(
                    f"{name} would change the samples that {type(calibrated.method).__name__} was fitted behind: "
                    f"calibrate logits first, the finished prediction after"
                )
    if method.changes_samples and is_recalibrated(likelihood):
        raise ValueError(
            f"{name} would change the mixture that CDFRecalibration was fitted to: use it first and "
            f"CDFRecalibration after, or CDFRecalibration alone, which corrects a wrong scale too"
        )


def _overlap(predictor: Predictor, rows: Tensor) -> int:
    """The number of rows, given by their fingerprints, that the posterior was trained on."""
    # an ensemble of several architectures is trained as a whole, or part by part
    posterior = predictor.posterior
    seen = [trained.training_rows for trained in (posterior, *posterior.parts)]
    known = [trained for trained in seen if trained is not None]
    return int(torch.isin(rows, torch.cat(known)).sum()) if known else 0


def _check_kind(method: Calibrator, prediction: Prediction) -> None:
    """Raises ValueError for a calibrator of classes on a regression, or the other way round."""
    name, probs = type(method).__name__, prediction.probs
    if method.of_classes and probs is None:
        raise ValueError(f"{name} is for classes, and this is a regression: use AbsoluteIntervals, CQR or StdScaling")
    if not method.of_classes and probs is not None:
        raise ValueError(f"{name} is for regressions, and this predicts classes: use Temperature or ConformalSets")
    if probs is not None and probs.ndim > 1 and prediction.total.shape == probs.shape:
        raise ValueError(
            f"{name} makes one set of classes a row, and this prediction answers {probs.shape[1:].numel()} "
            f"questions of yes or no (multi-label): take one question at a time, with p = predict(x) and "
            f"{name}(alpha).fit(p.probs[:, i], y[:, i].long())"
        )


def _probs(method: Calibrator, prediction: Prediction) -> Tensor:
    if prediction.probs is None:
        raise ValueError(f"{type(method).__name__} calibrates class probabilities; for a regression use StdScaling")
    return prediction.probs


def _fit_logits(method: Calibrator, prediction: Prediction, y: Tensor) -> None:
    _probs(method, prediction)
    logits = prediction.samples
    assert logits is not None
    if logits.ndim == y.ndim + 1:
        if not method.one_logit:
            raise ValueError(
                f"{type(method).__name__} needs a logit for each class, and this likelihood has one for yes and no: "
                "use Temperature or Platt"
            )
        # one logit l is the pair (0, l); dividing it by T is dividing both
        logits = logits.reshape(logits.shape[0], -1)
        logits = torch.stack((torch.zeros_like(logits), logits), dim=-1)
    method.fit(logits.reshape(logits.shape[0], -1, logits.shape[-1]), y.reshape(-1).long())


def _fit_probs(method: Calibrator, prediction: Prediction, y: Tensor) -> None:
    probs = _probs(method, prediction)
    flat = probs.reshape(-1) if probs.ndim == y.ndim else probs.reshape(-1, probs.shape[-1])
    method.fit(flat, y.reshape(-1).long())
