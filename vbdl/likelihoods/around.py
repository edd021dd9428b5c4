"""The base class of likelihoods that wrap another likelihood: centered targets, a calibration, a decision."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from vbdl.types import OUTCOMES, Likelihood, OutputHessian, Prediction, State


class Around(Likelihood):
    """A likelihood that forwards every call to the wrapped one; a subclass overrides what it changes."""

    likelihood: Likelihood
    decides: bool = False  # whether it adds an action to predictions

    def __init__(self, likelihood: Likelihood):
        super().__init__()
        self.likelihood = likelihood

    @property
    def learned_noise(self) -> int:
        return self.likelihood.learned_noise

    @property
    def wrapped(self) -> Likelihood:
        return self.likelihood

    def forward(self, outputs: Tensor) -> Tensor:
        return self.likelihood(outputs)

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        return self.likelihood.check_targets(y, parameters_shape)

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.nll(parameters, y)

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.training_loss(parameters, y)

    def hessian(self, outputs: Tensor, y: Tensor) -> OutputHessian:
        return self.likelihood.hessian(outputs, y)

    def squared_residuals(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.squared_residuals(parameters, y)

    def scale_noise(self, factors: Tensor) -> None:
        self.likelihood.scale_noise(factors)

    def summarize(self, parameters: Tensor) -> State:
        return self.likelihood.summarize(parameters)

    def merge(self, a: State, b: State) -> State:
        return self.likelihood.merge(a, b)

    def finish(self, summary: State) -> State:
        return self.likelihood.finish(summary)

    def prediction(self, fields: State, n_samples: int | Tensor, samples: Tensor | None = None) -> Prediction:
        """The wrapped likelihood's prediction, with the fields that calibrators and decisions have added."""
        added = {name: value for name, value in fields.items() if name in OUTCOMES}
        inner = {name: value for name, value in fields.items() if name not in added}
        prediction = self.likelihood.prediction(inner, n_samples, samples)
        return replace(prediction, **added) if added else prediction


def layers(likelihood: Likelihood) -> Iterator[Likelihood]:
    """Yield the likelihood and all it wraps, outermost first: a decision, calibrations, the one that was trained."""
    layer: Likelihood | None = likelihood
    while layer is not None:
        yield layer
        layer = layer.wrapped
