"""`vbdl.calibrate`: fit a calibrator to a predictor, on rows that were not used for training."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
from torch import Tensor

from vbdl.calibration.calibrated import CalibratedLikelihood, calibrations, is_recalibrated
from vbdl.calibration.overlap import row_numbers, trained_on
from vbdl.calling.inputs import flatten
from vbdl.data.fingerprint import fingerprints
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.around import Around
from vbdl.types import Calibrator, Inputs, Likelihood, Prediction

STAGES = ("logits", "probs", "prediction")
_P = ParamSpec("_P")


def _accepts_x_and_y(function: Callable[_P, Predictor]) -> Callable[_P, Predictor]:
    """Wrap `calibrate` so that it also accepts version 0.1's (predictor, x, y, method), with a DeprecationWarning."""
    old_form = inspect.signature(lambda predictor, x, y, method, *, allow_overlap=False: None)
    new_form: Callable[..., Predictor] = function

    def of_old_form(args: tuple, kwargs: dict[str, object]) -> dict[str, object] | None:
        try:
            return old_form.bind(*args, **kwargs).arguments
        except TypeError:
            return None

    @functools.wraps(function)
    def either(*args, **kwargs):
        old = of_old_form(args, kwargs)
        if old is None:  # outside the except above, or errors would begin with that TypeError
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
        data: (x, y), calibration rows in the form of training data. None of them may be a training row.
        method: a calibrator of vbdl.calibration or your own `vbdl.types.Calibrator`. It is copied, and the copy is
            fitted in float64. Temperature(), VectorScaling and MatrixScaling act on each sample's logits, other
            calibrators of classes on the mean probability; StdScaling acts on the variances, CDFRecalibration on
            quantiles and densities (of a prediction with samples=True). ConformalSets adds the field `sets` to
            predictions; AbsoluteIntervals, NormalizedIntervals and CQR add `lower` and `upper`.
        allow_overlap: calibrate even if rows were used for training. Their number is recorded in the likelihood
            (n_overlap) and saved with it, as are the fingerprints of all calibration rows (calibration_rows).

    Raises ValueError if rows were used for training (`vbdl.unseen` returns the others), and for data to which the
    method cannot be fitted. Training rows are known by the fingerprints that vbdl.fit records; a posterior trained in
    another way cannot be checked.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> x, y = torch.randn(100, 4), torch.randint(3, (100,))
    >>> calibrated = vbdl.calibrate(predict, (x, y), vbdl.calibration.Dirichlet())
    >>> calibrated(x).log_prob(y).mean() > predict(x).log_prob(y).mean()
    tensor(True)
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(f"calibrate needs a Predictor, got {type(predictor).__name__}")
    if not isinstance(method, Calibrator) or method.acts_on not in STAGES:
        raise TypeError(
            f"method must be a calibrator of vbdl.calibration or of a class that inherits from vbdl.types.Calibrator, "
            f"got {type(method).__name__}"
        )
    if not isinstance(data, Sequence) or len(data) != 2:
        raise TypeError(f"calibrate needs the calibration rows as a pair (x, y), got {type(data).__name__}")
    x, y = data
    _check_order(predictor.likelihood, method)
    x, y = flatten(x).nested, torch.as_tensor(y, device=predictor.device)
    n_rows = y.shape[0] if y.ndim else 0
    if n_rows == 0:
        raise ValueError("there are no rows to calibrate on")
    rows = fingerprints(x)
    seen = trained_on(predictor, rows)
    n_overlap = int(seen.sum())
    if n_overlap and not allow_overlap:
        raise ValueError(
            f"{n_overlap} of {n_rows} calibration rows were trained on ({row_numbers(seen)}), so the calibration would "
            "be too optimistic. Drop them: rows = vbdl.unseen(predictor, x), then x[rows], y[rows]; or allow them, "
            "which is recorded: allow_overlap=True"
        )
    needs_samples = method.acts_on == "logits" or method.needs_samples
    # a sealed predictor cannot compile for new shapes, so an unsealed copy with the same draws predicts
    source = predictor.replace() if predictor.sealed else predictor
    prediction = source(x, samples=needs_samples)
    target = predictor.likelihood.check_targets(y, prediction.parameters_shape)
    ignored = getattr(predictor.likelihood, "ignore_index", None)
    if ignored is not None and bool((target == ignored).any()):
        raise ValueError(
            f"{int((target == ignored).sum())} targets are {ignored} and do not count, but calibration compares every "
            f"prediction with a target: calibrate on rows without padding"
        )
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
    """Raise ValueError if the method would change the inputs of an existing calibration or decision."""
    name = type(method).__name__
    if isinstance(likelihood, Around) and likelihood.decides:
        raise ValueError("this predictor already has a decision, on uncalibrated predictions: calibrate it first")
    if method.acts_on == "logits":
        for calibrated in calibrations(likelihood):
            if calibrated.method.acts_on != "logits":
                raise ValueError(
                    f"{name} would change the samples, after {type(calibrated.method).__name__} was fitted to their "
                    f"prediction: calibrate the logits first"
                )
    if method.changes_samples and is_recalibrated(likelihood):
        raise ValueError(
            f"{name} would change the mixture that CDFRecalibration was fitted to: use {name} before "
            f"CDFRecalibration, or only CDFRecalibration, which corrects the scale, too"
        )


def _check_kind(method: Calibrator, prediction: Prediction) -> None:
    """Raise ValueError if a calibrator for classes is used for a regression, or vice versa."""
    name, probs = type(method).__name__, prediction.probs
    if method.of_classes and probs is None:
        raise ValueError(f"{name} is for classes, but this is a regression: use AbsoluteIntervals, CQR or StdScaling")
    if not method.of_classes and probs is not None:
        raise ValueError(f"{name} is for regressions, but this predicts classes: use Temperature or ConformalSets")
    if probs is not None and probs.ndim > 1 and prediction.total.shape == probs.shape:
        raise ValueError(
            f"{name} makes one set of classes per row, but this prediction has {probs.shape[1:].numel()} binary "
            f"outputs (multi-label): fit one for each output, with p = predict(x) and "
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
                f"{type(method).__name__} needs a logit for each class, but this likelihood has a single logit for two "
                "classes: use Temperature or Platt"
            )
        # a single logit l is equivalent to the pair (0, l), also after division by T
        logits = logits.reshape(logits.shape[0], -1)
        logits = torch.stack((torch.zeros_like(logits), logits), dim=-1)
    method.fit(logits.reshape(logits.shape[0], -1, logits.shape[-1]), y.reshape(-1).long())


def _fit_probs(method: Calibrator, prediction: Prediction, y: Tensor) -> None:
    probs = _probs(method, prediction)
    flat = probs.reshape(-1) if probs.ndim == y.ndim else probs.reshape(-1, probs.shape[-1])
    method.fit(flat, y.reshape(-1).long())
