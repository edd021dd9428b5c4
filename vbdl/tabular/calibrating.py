"""The default calibration of `fit_table`: temperature or std scaling if held-out scores improve, then conformal sets or
intervals, each fitted to rows of its own."""

import copy
import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vbdl.calibration.calibrate import calibrate
from vbdl.calibration.conformal import ConformalSets
from vbdl.calibration.conformal_intervals import NormalizedIntervals
from vbdl.calibration.std_scaling import StdScaling
from vbdl.calibration.temperature import Temperature
from vbdl.data.fingerprint import fingerprints
from vbdl.data.splitting import split
from vbdl.engine.predictor import Predictor
from vbdl.metrics.nll import mixture_nll

MIN_ROWS = 20  # smallest number of rows to fit a calibrator to
_FOLDS = 5


@dataclass(frozen=True)
class CalibrationRows:
    """The rows that a predictor may be calibrated on, with the groups or times by which they may be divided.

    together: (rows,) group numbers; rows of one group, like a patient's rows or equal rows, are never divided.
    when: (rows,) the order in time if the table was split by time, else None; earlier rows then calibrate first.
    meant: whether rows may repeat training rows.
    """

    x: Tensor
    y: Tensor
    together: Tensor
    when: Tensor | None = None
    meant: bool = False

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor) -> "CalibrationRows":
        when = None if self.when is None else self.when[rows]
        return CalibrationRows(self.x[rows], self.y[rows], self.together[rows], when, self.meant)

    def divided(self, parts: int, seed: int) -> list[Tensor]:
        """Divide the rows into parts of equal size and return their row numbers.

        The division is by time if the table was split by time, otherwise at random with every group in one part.
        Raises ValueError if there are too few groups or instants.
        """
        shares = {str(i): 1 / parts for i in range(parts)}
        if self.when is not None:
            return list(split(len(self), shares, time=self.when).values())
        if len(self.together.unique()) == len(self):
            return list(split(len(self), shares, seed=seed).values())
        return list(split(len(self), shares, groups=self.together, seed=seed).values())

    def folds(self, seed: int) -> list[Tensor] | None:
        """Return the row numbers of five or two folds, or None if there are too few groups or instants for two."""
        for parts in (_FOLDS, 2):
            try:
                return self.divided(parts, seed)
            except ValueError:
                continue
        return None


@dataclass
class Calibrated:
    """A calibrated predictor, and notes about its calibration for the user."""

    predictor: Predictor
    notes: list[str] = field(default_factory=list)


def unseen_rows(rows: CalibrationRows, training: Tensor) -> CalibrationRows:
    """The rows whose encoded inputs differ from every training row's; encoding may make rare categories equal."""
    if rows.meant:
        return rows
    return rows.take((~torch.isin(fingerprints(rows.x), fingerprints(training))).nonzero().flatten())


def calibrate_by_default(predictor: Predictor, rows: CalibrationRows, coverage: float, seed: int) -> Calibrated:
    """Calibrate a predictor with the default methods of `fit_table`.

    One half of the rows fits temperature or std scaling, which is kept only if it raises the likelihood of held-out
    rows of that half. The other half fits conformal sets or intervals of this coverage, or none if it is 0.
    """
    calibrated = Calibrated(predictor)
    if len(rows) < MIN_ROWS:
        calibrated.notes.append(f"{len(rows)} calibration rows are too few: the predictions are not calibrated")
        return calibrated
    halves = None
    if coverage > 0 and len(rows) >= 2 * MIN_ROWS:
        try:
            halves = rows.divided(2, seed)
        except ValueError:
            calibrated.notes.append(
                "the calibration rows are of one group or instant: only sets or intervals are fitted"
            )
            halves = [torch.empty(0, dtype=torch.int64), torch.arange(len(rows))]
    elif coverage > 0:
        calibrated.notes.append(
            f"{len(rows)} calibration rows are too few for sets or intervals of {coverage:.0%} as well"
        )
    first = rows if halves is None else rows.take(halves[0])
    if len(first):
        _scale(calibrated, first, seed)
    if halves is not None:
        rest, alpha = rows.take(halves[1]), 1 - coverage
        method = NormalizedIntervals(alpha) if rest.y.is_floating_point() else ConformalSets(alpha)
        calibrated.predictor = calibrate(calibrated.predictor, (rest.x, rest.y), method, allow_overlap=rows.meant)
    return calibrated


def _scale(calibrated: Calibrated, rows: CalibrationRows, seed: int) -> None:
    method = StdScaling() if rows.y.is_floating_point() else Temperature()
    name = "std scaling" if rows.y.is_floating_point() else "temperature"
    try:
        scores = _cross_fitted(calibrated.predictor, rows, method, seed)
        if scores is None:
            calibrated.notes.append(f"no {name}: the calibration rows are of too few groups or instants to compare it")
            return
        none, with_it = scores
        comparison = f"NLL of {len(rows)} held-out calibration rows {with_it:.4g} with it, {none:.4g} without"
        if not with_it < none:
            calibrated.notes.append(f"no {name}, which would make predictions worse: {comparison}")
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the temperature ended at its limit")
            calibrated.predictor = calibrate(calibrated.predictor, (rows.x, rows.y), method, allow_overlap=rows.meant)
        calibrated.notes.append(f"{name} fitted: {comparison}")
    except UserWarning as error:
        calibrated.notes.append(f"no temperature was fitted: {error}")


def _cross_fitted(
    predictor: Predictor, rows: CalibrationRows, method: StdScaling | Temperature, seed: int
) -> tuple[float, float] | None:
    """Return the mean NLL of the rows without the method and with it, in nats per row.

    The method is cross-fitted: each fold is scored after a fit to the other folds. None if the rows cannot be divided.
    """
    folds = rows.folds(seed)
    if folds is None:
        return None
    samples = predictor(rows.x, samples=True).samples
    assert samples is not None
    after = torch.empty(len(rows), dtype=torch.float64)
    for fold in folds:
        others = torch.ones(len(rows), dtype=torch.bool)
        others[fold] = False
        fitted = copy.deepcopy(method)
        with warnings.catch_warnings():
            # a temperature at its limit is accepted here: the score of the held-out rows decides
            warnings.filterwarnings("ignore", "the temperature ended at its limit")
            if isinstance(fitted, StdScaling):
                mean, log_variance = samples[:, others].unbind(-1)
                fitted.fit(mean, (0.5 * log_variance).exp(), rows.y[others])
            else:
                fitted.fit(samples[:, others], rows.y[others])
        held_out = samples[:, fold]
        corrected = fitted.samples(held_out) if isinstance(fitted, StdScaling) else fitted(held_out)
        after[fold] = _nll(corrected, rows.y[fold])
    return float(_nll(samples, rows.y).mean()), float(after.mean())


def _nll(samples: Tensor, y: Tensor) -> Tensor:
    """Return the (rows,) negative log-likelihood of the mixture over samples, in nats.

    samples: logits (samples, rows, classes) with classes y (rows,), or mean and log-variance (samples, rows, 1, 2) with
    numbers y (rows, 1).
    """
    if y.is_floating_point():
        mean, log_variance = samples.unbind(-1)
        return mixture_nll(mean, (0.5 * log_variance).exp(), y)
    log_probs = samples.double().log_softmax(-1)[:, torch.arange(len(y)), y]
    return math.log(len(samples)) - log_probs.logsumexp(0)
