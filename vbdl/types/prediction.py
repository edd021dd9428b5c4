"""The base class of predictions: p(y | x) for a batch of rows."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

OUTCOMES = ("sets", "lower", "upper", "action", "reason", "distance", "risk", "var", "es")
"""The fields of a prediction that calibrators and decisions add."""


class Recalibration(Protocol):
    """An increasing map of a distribution function F, as a map of normal scores Φ⁻¹(F), in float64."""

    def score(self, score: Tensor) -> Tensor:
        """The calibrated normal score from that of the predictive distribution, any shape."""
        ...

    def inverse(self, score: Tensor) -> Tensor:
        """The normal score of the predictive distribution from the calibrated one, any shape."""
        ...

    def log_slope(self, score: Tensor) -> Tensor:
        """The log of the factor that the map multiplies the density by at this normal score of the predictive."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of a predictor: p(y | x) for a batch of rows as tensors, the batch axis first.

    Each likelihood has a subclass of it, a frozen dataclass with keyword fields. Every value that the library reads
    from a prediction is named here; None means that this kind of prediction has no such value.
    """

    n_samples: int | Tensor  # number of draws; (batch,) if draws were added until each row was settled
    total: Tensor  # (batch, ...) uncertainty: nats for classes, a variance in squared target units for regressions
    aleatoric: Tensor  # (batch, ...) the part of total that more training data would not remove
    epistemic: Tensor  # (batch, ...) the part of total that more training data would remove
    standard_error: Tensor | None = None  # Monte Carlo standard error of the mean
    samples: Tensor | None = None  # (samples, batch, ...) parameters of p(y | x) of each draw, if requested
    # added by calibrators
    sets: Tensor | None = None  # (batch, classes) bool, which classes a conformal set holds
    lower: Tensor | None = None  # (batch, ...) bounds of the conformal interval
    upper: Tensor | None = None
    # added by decisions
    action: Tensor | None = None  # (batch,) the decision's action
    reason: Tensor | None = None  # (batch,) int64, the first rule that referred the row, from 1; 0: none did
    distance: Tensor | None = None  # (batch,) from the training rows in the space of features
    risk: Tensor | None = None  # (batch,) the number by which the action was chosen
    var: Tensor | None = None  # (batch, ...) value at risk
    es: Tensor | None = None  # (batch, ...) expected shortfall

    # Each of these is a field of some subclasses and a property of others, so it is no field here.
    mean: ClassVar[Tensor]  # (batch, ...) E[y], or the probabilities of classes; every prediction has it
    probs: ClassVar[Tensor | None] = None  # (batch, ..., classes), or (batch, ...) p(y = 1); None in a regression
    label: ClassVar[Tensor | None] = None  # (batch, ...) the most probable class
    confidence: ClassVar[Tensor | None] = None  # (batch, ...) probability of the label
    std: ClassVar[Tensor | None] = None  # (batch, ...) predictive standard deviation
    output_axis: ClassVar[int] = -1  # the axis of the outputs in mean, counted from the end
    recalibration: ClassVar[Recalibration | None] = None  # the calibrator's map of the distribution function

    @property
    def parameters_shape(self) -> tuple[int, ...]:
        """The shape of one draw's parameters of p(y | x), (batch, ...), as `check_targets` takes it.

        Override it if the parameters do not have the shape of the mean.
        """
        return tuple(self.mean.shape if self.samples is None else self.samples.shape[1:])

    def values(self) -> dict[str, Tensor]:
        """All per-row values of this prediction by name, which served answers and files of predictions contain."""
        center = {"mean": self.mean} if self.probs is None else {"probs": self.probs}
        named = {
            **center,
            "std": self.std,
            "confidence": self.confidence,
            "total": self.total,
            "aleatoric": self.aleatoric,
            "epistemic": self.epistemic,
            "standard_error": self.standard_error,
            "lower": self.lower,
            "upper": self.upper,
            "sets": self.sets,
            "action": self.action,
            "reason": self.reason,
            "distance": self.distance,
            "risk": self.risk,
            "var": self.var,
            "es": self.es,
        }
        return {name: value for name, value in named.items() if value is not None}

    def log_prob(self, y: Tensor) -> Tensor:
        """The log density log p(y | x), (batch,), in nats."""
        raise NotImplementedError(f"{type(self).__name__} has no density; give it a method log_prob(y)")

    def cdf(self, y: Tensor) -> Tensor:
        """The probability of at most y, (batch, ...)."""
        raise NotImplementedError(f"{type(self).__name__} has no distribution function; give it a method cdf(y)")

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The bounds of the central interval that holds y with probability `level`, (batch, ...) each."""
        raise NotImplementedError(f"{type(self).__name__} has no intervals; give it a method interval(level)")

    def quantile(self, q: float | Tensor) -> Tensor:
        """The quantiles at the level(s) q, () or (levels,): (batch, ...) or (levels, batch, ...)."""
        raise NotImplementedError(f"{type(self).__name__} has no quantiles; give it a method quantile(q)")

    def normals(self) -> tuple[Tensor, Tensor]:
        """The means and standard deviations of a mixture of normal distributions, (samples, batch, ...) each."""
        raise NotImplementedError(self._no_normals("StdScaling scales"))

    def score(self, y: Tensor) -> Tensor:
        """The normal score Φ⁻¹(cdf(y)), (batch, ...), float64, of a mixture of normal distributions."""
        raise NotImplementedError(self._no_normals("CDFRecalibration recalibrates"))

    def _no_normals(self, what: str) -> str:
        return (
            f"{type(self).__name__} is no mixture of normal distributions, and {what} only these. Use "
            f"AbsoluteIntervals or NormalizedIntervals of vbdl.calibration, which need mean and total; or inherit from "
            f"vbdl.likelihoods.normal_mixture.RegressionPrediction, with samples (samples, batch, ..., 2) of means and "
            f"log-variances"
        )
