"""Calibration of a saved model of a table on new rows."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vbdl import calibration
from vbdl.artifact.loading import load
from vbdl.artifact.manifest import Architecture, Ensemble, Reference, Single
from vbdl.calibration.calibrate import calibrate
from vbdl.calibration.calibrated import CalibratedLikelihood, calibrations
from vbdl.data.fingerprint import fingerprints
from vbdl.engine.predictor import Predictor
from vbdl.tabular.calibrating import CalibrationRows
from vbdl.tabular.evaluation import evaluate
from vbdl.tabular.fitting import ARCHITECTURE
from vbdl.tabular.labeled import Labeled, labeled
from vbdl.types import Calibrator, Keywords, Likelihood

METHODS: dict[str, Callable[[float], Calibrator]] = {
    "temperature": lambda alpha: calibration.Temperature(),
    "platt": lambda alpha: calibration.Platt(),
    "isotonic": lambda alpha: calibration.Isotonic(),
    "histogram": lambda alpha: calibration.Histogram(),
    "beta": lambda alpha: calibration.Beta(),
    "std-scaling": lambda alpha: calibration.StdScaling(),
    "cdf": lambda alpha: calibration.CDFRecalibration(),
    "sets": lambda alpha: calibration.ConformalSets(alpha),
    "intervals": lambda alpha: calibration.NormalizedIntervals(alpha),
}

_OF_NUMBERS = ("std-scaling", "cdf", "intervals")


def recalibrate(
    model: str | Path,
    data: object,
    out: str | Path,
    method: str | None = None,
    coverage: float = 0.9,
    add: bool = False,
    overwrite: bool = False,
    trust: Sequence[str] = (),
) -> str:
    """Calibrate the model of a folder on a table, and save it to another folder. Return a report as text.

    method: one of METHODS; by default temperature for classes and std-scaling for numbers.

    The report has scores on the calibration rows themselves: they show that the fit worked, not how good it is on
    other rows.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage lies between 0 and 1, got {coverage}")
    if Path(out).resolve() == Path(model).resolve():
        raise ValueError("the calibrated model cannot replace the model that it is made from: give it another folder")
    predictor = load(model, trust=trust, compile=False)
    rows = labeled(predictor, data, allow_calibration_rows=True)
    is_number = rows.schema.target.classes is None
    if method is None:
        method = "std-scaling" if is_number else "temperature"
    if (method in _OF_NUMBERS) != is_number:
        fitting = ", ".join(name for name in METHODS if (name in _OF_NUMBERS) == is_number)
        raise ValueError(
            f"{method} calibrates {'class probabilities' if is_number else 'a regression'}, and "
            f"{rows.schema.target.name} {'is a number' if is_number else 'has classes'}: choose among {fitting}"
        )
    start = predictor if add else _uncalibrated(predictor)
    calibrated = calibrate(start, (rows.x, rows.y), METHODS[method](1 - coverage))
    before = evaluate(predictor, rows.x, rows.y, rows.schema.target)
    after = evaluate(calibrated, rows.x, rows.y, rows.schema.target)
    held_out = [] if method in ("sets", "intervals") else _held_out(predictor, start, rows, METHODS[method])
    manifest = predictor.manifest
    assert manifest is not None  # load sets it
    network = _network(manifest.posterior)
    options: Keywords = {}
    if isinstance(network, Reference) and network.target == ARCHITECTURE:
        options = {"architecture": network.target, "arguments": network.arguments}
    extras = dict(manifest.extras)
    extras["calibration"] = {"method": method, "rows": len(rows.y), "coverage": coverage, "added": add}
    calibrated.save(out, extras=extras, example=rows.schema.example(), overwrite=overwrite, **options)
    lines = [f"{'':24s} {'before':>10s} {'after':>10s}   on the {len(rows.y)} calibration rows themselves"]
    names = dict.fromkeys([s.name for s in (*before.scores, *after.scores)])
    for name in names:
        values = [next((f"{s.value:.4g}" for s in e.scores if s.name == name), "-") for e in (before, after)]
        lines.append(f"{name:24s} {values[0]:>10s} {values[1]:>10s}")
    lines += held_out
    earlier = _methods(predictor.likelihood)
    replaced = [name for name in earlier if not add or name == method in ("sets", "intervals")]
    remaining = [name for name in earlier if name not in replaced]
    lines.append("scores on other rows: vbdl evaluate")
    lines += [f"fitted: {method}"]
    lines += [f"kept: {', '.join(remaining)}"] if remaining else []
    if replaced:
        lines += [f"replaced: {', '.join(replaced)}{'' if add else ' (--add keeps what the model has)'}"]
    return "\n".join([*(f"note: {n}" for n in rows.notes), *lines, f"saved to {out}"])


def _held_out(predictor: Predictor, start: Predictor, rows: Labeled, make: Callable[[float], Calibrator]) -> list[str]:
    """Return lines with the NLL before and after calibration, cross-fitted: no row is scored by a fit to itself."""
    together = fingerprints(rows.x).unique(return_inverse=True)[1]
    available = CalibrationRows(rows.x, rows.y, together, meant=True)
    folds = available.folds(seed=0)
    if folds is None:
        return []
    after = torch.empty(len(rows.y), dtype=torch.float64)
    for fold in folds:
        others = torch.ones(len(rows.y), dtype=torch.bool)
        others[fold] = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the fit to all rows has already warned
                fitted = calibrate(start, (rows.x[others], rows.y[others]), make(0.1))
        except ValueError as error:
            return [f"held-out scores: none, for {error}"]
        after[fold] = -fitted(rows.x[fold], samples=True).log_prob(rows.y[fold]).double()
    before = predictor(rows.x, samples=True)
    scores = float(-before.log_prob(rows.y).double().mean()), float(after.mean())
    sentence = f"held-out NLL: {scores[0]:.4g} before, {scores[1]:.4g} after, each row scored by a fit to others"
    if scores[1] <= scores[0]:
        return [sentence]
    return [sentence, "warning: on rows it was not fitted to, this calibration makes predictions worse"]


def _uncalibrated(predictor: Predictor) -> Predictor:
    """Return the predictor without its outermost calibrations."""
    likelihood = predictor.likelihood
    while isinstance(likelihood, CalibratedLikelihood):
        likelihood = likelihood.likelihood
    return predictor.replace(likelihood=likelihood)


def _methods(likelihood: Likelihood) -> list[str]:
    """Return the names (of --method) of a likelihood's calibrations, innermost first."""
    names = {type(make(0.1)): name for name, make in METHODS.items()}
    methods = [type(calibrated.method) for calibrated in reversed(calibrations(likelihood))]
    return [names.get(method, method.__name__) for method in methods]


def _network(posterior: Single | Ensemble) -> Architecture:
    """Return the architecture in a manifest's posterior, that of the first members if there are several."""
    return (posterior.members[0].member if isinstance(posterior, Ensemble) else posterior).network
