"""A likelihood with a calibration inside it, traced and compiled with the network."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.special import xlogy

from vbdl.types import Likelihood, State

_ADDED = ("sets", "lower", "upper")  # fields that a calibration adds to a prediction


class CalibratedLikelihood(Likelihood):
    """The likelihood it was given, read through a calibration method.

    What total, aleatoric and epistemic are afterwards, which always add up:

    * acts_on "logits" (a temperature on each sample): entropies of the calibrated samples and of their mean, with
      the meaning that they had.
    * acts_on "probs": total is the entropy of the calibrated mean probability. Single samples were not
      calibrated, so their share is carried over: epistemic is as large a part of total as before. It is 0
      where the samples agree, and orders rows of equal total as before.
    * std scaling: all three variances times scale².
    * CDF recalibration: untouched, and so is the mean; quantiles, intervals and densities are the new ones.
    * conformal sets and intervals: untouched; they add fields of their own.

    standard_error stays that of the uncalibrated mean.
    """

    likelihood: Any
    method: Any

    def __init__(
        self,
        likelihood: nn.Module,
        method: nn.Module,
        n_rows: int,
        n_overlap: int,
        calibration_rows: Tensor | None = None,
    ):
        super().__init__()
        if calibration_rows is not None and (calibration_rows.dtype != torch.int64 or calibration_rows.ndim != 1):
            raise ValueError("the fingerprints of the calibration rows are not one int64 a row")
        self.likelihood, self.method = likelihood, method
        # buffers, so that a saved predictor says what it was calibrated on
        self.register_buffer("n_rows", torch.tensor(n_rows))
        self.register_buffer("n_overlap", torch.tensor(n_overlap))
        # fingerprints, (rows,) int64 sorted; None in what was saved before they were recorded
        self.register_buffer("calibration_rows", calibration_rows)

    @property
    def n_members(self) -> int | None:
        return self.likelihood.n_members

    @property
    def wrapped(self) -> Likelihood:
        return self.likelihood

    def forward(self, outputs: Tensor) -> Tensor:
        parameters = self.likelihood(outputs)
        return self.method(parameters) if self.method.acts_on == "logits" else parameters

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return self.likelihood.check_targets(y, parameters_shape)

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        if self.method.acts_on != "logits":
            raise ValueError(
                f"{type(self.method).__name__} calibrates the finished prediction and not its single samples, which "
                "have no likelihood of their own: use predict(x, samples=True).log_prob(y)"
            )
        return self.likelihood.nll(parameters, y)

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.nll(parameters, y)

    def summarize(self, parameters: Tensor) -> State:
        return self.likelihood.summarize(parameters)

    def merge(self, a: State, b: State) -> State:
        return self.likelihood.merge(a, b)

    def finish(self, summary: State) -> State:
        fields = self.likelihood.finish(summary)
        if self.method.acts_on == "probs":
            return _with_probs(fields, self.method)
        return self.method.fields(fields) if self.method.acts_on == "prediction" else fields

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> Any:
        """The likelihood's own prediction, with the fields that the method has added.

        samples are those of the calibrated predictive, except for "probs": there they stay as they were.
        """
        if samples is not None and hasattr(self.method, "samples"):
            samples = self.method.samples(samples)
        made = extend(self.likelihood.prediction, fields, n_samples, samples, _ADDED)
        return _wrapped(self.method, made) if hasattr(self.method, "wrap") else made


def calibration_rows(likelihood: Any) -> tuple[Tensor, bool]:
    """Fingerprints of the rows that a likelihood was calibrated on, (rows,) int64, and whether all were recorded."""
    found, complete = [], True
    while likelihood is not None:
        if isinstance(likelihood, CalibratedLikelihood):
            known: Any = likelihood.calibration_rows
            complete = complete and known is not None
            found += [] if known is None else [known.cpu()]
        likelihood = likelihood.wrapped
    return torch.cat(found).unique() if found else torch.empty(0, dtype=torch.int64), complete


def _with_probs(fields: State, calibrator: nn.Module) -> State:
    """Fields with calibrated probabilities: one distribution (..., classes), or (...,) of yes and no."""
    probs, before = fields["probs"], fields["total"]
    many = probs.ndim > before.ndim
    flat = probs.reshape(-1, probs.shape[-1]) if many else probs.reshape(-1)
    probs = calibrator(flat).reshape(probs.shape)
    total = 0.0 - xlogy(probs, probs)  # 0 and never -0.0 where it is certain
    total = total.sum(-1) if many else total - xlogy(1 - probs, 1 - probs)
    share = torch.where(before > 0, fields["epistemic"] / before.clamp_min(1e-30), 0.0).clamp(0, 1)
    epistemic = total * share
    changed = {"probs": probs, "total": total, "epistemic": epistemic, "aleatoric": total - epistemic}
    return {**fields, **changed}


def _wrapped(method: Any, prediction: Any) -> Any:
    """What the method makes of the prediction, with the fields that calibrations before it have added."""
    wrapped = method.wrap(prediction)
    added = {n: getattr(prediction, n) for n in _ADDED if hasattr(prediction, n)}
    if not added:
        return wrapped
    values = {f.name: getattr(wrapped, f.name) for f in dataclasses.fields(wrapped)}
    return _extended(type(wrapped), tuple(added))(**values, **added)


def extend(make: Any, fields: State, n_samples: int, samples: Tensor | None, names: Sequence[str]) -> Any:
    """make(fields, ...) with those of `names` that are among the fields as further fields of its class."""
    extra = {n: fields[n] for n in names if n in fields}
    base = make({n: t for n, t in fields.items() if n not in extra}, n_samples, samples)
    if not extra:
        return base
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return _extended(type(base), tuple(extra))(**values, **extra)


@functools.cache
def _extended(base: type, names: tuple[str, ...]) -> type:
    """A subclass of a prediction with more tensors: isinstance, properties and methods stay."""
    new = [(n, Tensor | None, dataclasses.field(default=None)) for n in names]
    made: Any = dataclasses.make_dataclass(base.__name__, new, bases=(base,), frozen=True)
    made.__module__ = base.__module__
    made._extends, made.__reduce__ = (base, names), _reduce
    return made


def _reduce(prediction: Any) -> tuple[Any, ...]:
    """For pickle, which finds no class that was made at run time: what to make it of."""
    base, added = type(prediction), []
    while (extends := vars(base).get("_extends")) is not None:
        base, names = extends
        added.insert(0, names)
    values = {f.name: getattr(prediction, f.name) for f in dataclasses.fields(prediction)}
    return _restored, (base, added, values)


def _restored(base: type, added: list[tuple[str, ...]], values: dict[str, Any]) -> Any:
    for names in added:
        base = _extended(base, names)
    return base(**values)
