"""A likelihood that contains a calibration, which is traced and compiled with the network."""

import torch
from torch import Tensor
from torch.special import xlogy

from vbdl.calibration.recalibrated import Recalibrations, recalibrated
from vbdl.likelihoods.around import Around, layers
from vbdl.likelihoods.normal_mixture import RegressionPrediction
from vbdl.types import Calibrator, Likelihood, Prediction, Recalibration, State


class CalibratedLikelihood(Around):
    """A likelihood whose predictions are corrected by a calibrator, `method`.

    total, aleatoric and epistemic always add up. Depending on the method they are:

    * acts_on "logits" (a temperature on each sample): the entropies of the calibrated samples and of their mean, with
      the same meaning as before.
    * acts_on "probs": total is the entropy of the calibrated mean probability. The samples are not calibrated, so
      epistemic keeps its share of total; it is 0 if the samples agree, and orders rows of equal total as before.
    * std scaling: all three variances times scale.
    * CDF recalibration: unchanged, like the mean; quantiles, intervals and densities are recalibrated.
    * conformal sets and intervals: unchanged; they add fields.

    standard_error stays that of the uncalibrated mean.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> x, y = torch.randn(100, 4), torch.randint(3, (100,))
    >>> calibrated = vbdl.calibrate(predict, (x, y), vbdl.calibration.Dirichlet())
    >>> type(calibrated.likelihood).__name__, calibrated.likelihood.n_rows, calibrated.likelihood.n_overlap
    ('CalibratedLikelihood', tensor(100), tensor(0))
    """

    method: Calibrator

    def __init__(
        self,
        likelihood: Likelihood,
        method: Calibrator,
        n_rows: int,
        n_overlap: int,
        calibration_rows: Tensor | None = None,
    ):
        super().__init__(likelihood)
        if calibration_rows is not None and (calibration_rows.dtype != torch.int64 or calibration_rows.ndim != 1):
            raise ValueError("the fingerprints of the calibration rows must be one int64 per row, (rows,)")
        self.method = method
        # buffers, so that they are saved with the predictor
        self.register_buffer("n_rows", torch.tensor(n_rows))
        self.register_buffer("n_overlap", torch.tensor(n_overlap))
        # fingerprints, (rows,) int64 sorted; None in artifacts from before they were recorded
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

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        if self.method.acts_on != "logits":
            raise ValueError(
                f"{type(self.method).__name__} calibrates the whole prediction, not its samples, so a sample has no "
                "likelihood: use predict(x, samples=True).log_prob(y)"
            )
        return self.likelihood.nll(parameters, y)

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.nll(parameters, y)

    def finish(self, summary: State) -> State:
        fields = self.likelihood.finish(summary)
        if self.method.acts_on == "probs":
            return _with_probs(fields, self.method)
        return self.method.fields(fields) if self.method.acts_on == "prediction" else fields

    def prediction(self, fields: State, n_samples: int | Tensor, samples: Tensor | None = None) -> Prediction:
        """The inner likelihood's prediction, with the fields that the method adds.

        The samples are calibrated, too, except by methods that act on "probs".
        """
        if samples is not None:
            samples = self.method.samples(samples)
        prediction = super().prediction(fields, n_samples, samples)
        recalibration = self.method.recalibration
        if recalibration is None:
            return prediction
        if not isinstance(prediction, RegressionPrediction):
            raise TypeError(
                f"{type(self.method).__name__} needs a RegressionPrediction, got {type(prediction).__name__}: let it "
                f"inherit from vbdl.likelihoods.normal_mixture.RegressionPrediction"
            )
        return recalibrated(prediction, recalibration)


def calibrations(likelihood: Likelihood) -> list[CalibratedLikelihood]:
    """The calibrations inside a likelihood, the last fitted first."""
    return [layer for layer in layers(likelihood) if isinstance(layer, CalibratedLikelihood)]


def calibration_rows(likelihood: Likelihood) -> tuple[Tensor, bool]:
    """(fingerprints of the rows a likelihood was calibrated on, (rows,) int64; whether all were recorded)."""
    recorded = [one.calibration_rows for one in calibrations(likelihood)]
    known = [rows.cpu() for rows in recorded if isinstance(rows, Tensor)]
    rows = torch.cat(known).unique() if known else torch.empty(0, dtype=torch.int64)
    return rows, len(known) == len(recorded)


def calibrated_draws(likelihood: Likelihood, parameters: Tensor) -> tuple[Tensor, Recalibration | None]:
    """(the calibrated draws, (samples, batch, ..., 2); the recalibration of their mixture's distribution, or None).

    parameters: the draws before calibration, (samples, batch, ..., 2).
    """
    recalibration = None
    for calibrated in calibrations(likelihood):
        parameters = calibrated.method.samples(parameters)
        earlier = calibrated.method.recalibration
        if earlier is not None:
            recalibration = earlier if recalibration is None else Recalibrations(earlier, recalibration)
    return parameters, recalibration


def is_recalibrated(likelihood: Likelihood) -> bool:
    """Whether a calibration inside this likelihood recalibrates the predictive distribution function."""
    return any(calibrated.method.recalibration is not None for calibrated in calibrations(likelihood))


def changes_draws(likelihood: Likelihood) -> bool:
    """Whether a calibration inside this likelihood changes draws or the distribution of their mixture."""
    changed = any(calibrated.method.changes_samples for calibrated in calibrations(likelihood))
    return changed or is_recalibrated(likelihood)


def _with_probs(fields: State, calibrator: Calibrator) -> State:
    """The fields with calibrated probabilities, (..., classes), or (...,) of class 1, and with their entropies."""
    probs, before = fields["probs"], fields["total"]
    many = probs.ndim > before.ndim
    flat = probs.reshape(-1, probs.shape[-1]) if many else probs.reshape(-1)
    probs = calibrator(flat).reshape(probs.shape)
    total = 0.0 - xlogy(probs, probs)  # gives 0.0, not -0.0, for certain rows
    total = total.sum(-1) if many else total - xlogy(1 - probs, 1 - probs)
    share = torch.where(before > 0, fields["epistemic"] / before.clamp_min(1e-30), 0.0).clamp(0, 1)
    epistemic = total * share
    changed = {"probs": probs, "total": total, "epistemic": epistemic, "aleatoric": total - epistemic}
    return {**fields, **changed}
