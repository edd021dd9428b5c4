"""Real targets that are far from zero compared with their spread: dates, coordinates, counters."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vbdl.likelihoods.around import Around
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.likelihoods.normal_mixture import NormalLikelihood
from vbdl.types import OutputHessian, Prediction, State

# float32 rounds targets this many standard deviations from zero by about 1e-4 standard deviations
FAR = 1_000.0


def is_far(mean: float, std: float) -> bool:
    """Whether float32 is too coarse for numbers with this mean and standard deviation."""
    return abs(mean) > FAR * std


class Centered(Around):
    """A Gaussian likelihood of y - center, whose predictions are about y, in float64.

    The network, its training and every sum work on float32 numbers of the size of the targets' spread.
    center: subtracted from targets before they are converted to float32, and added to predicted means.
    """

    def __init__(self, likelihood: NormalLikelihood, center: float):
        super().__init__(likelihood)
        if not isinstance(likelihood, NormalLikelihood):
            raise TypeError(f"Centered is for Gaussian and HeteroscedasticGaussian, got {type(likelihood).__name__}")
        if not math.isfinite(center):
            raise ValueError(f"center must be a finite number, got {center}")
        # not a buffer: every tensor of a likelihood has a members axis after an ensemble's training
        self.center = float(center)

    def extra_repr(self) -> str:
        return f"center={self.center:.17g}"

    @property
    def noise_std(self) -> Tensor:
        """The noise std in target units, (outputs,), or (members, outputs) after an ensemble learned it.

        Raises AttributeError unless the wrapped likelihood is Gaussian.
        """
        if not isinstance(self.likelihood, Gaussian):
            raise AttributeError(f"{type(self.likelihood).__name__} has no noise_std")
        return self.likelihood.noise_std

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        """The targets in float64. Raises ValueError for targets in float32, which are rounded already."""
        if y.is_floating_point() and y.dtype != torch.float64:
            raise ValueError(f"targets about {self.center:.12g} are too coarse in {y.dtype}: give them in float64")
        return self.likelihood.check_targets(y.double(), parameters_shape)

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.nll(parameters, self._apart(parameters, y))

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.training_loss(parameters, self._apart(parameters, y))

    def hessian(self, outputs: Tensor, y: Tensor) -> OutputHessian:
        return self.likelihood.hessian(outputs, self._apart(outputs, y))

    def squared_residuals(self, parameters: Tensor, y: Tensor) -> Tensor:
        return self.likelihood.squared_residuals(parameters, self._apart(parameters, y))

    def _apart(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The targets minus center, subtracted before rounding to the dtype of the parameters."""
        return (y - self.center).to(torch.promote_types(parameters.dtype, torch.float32))

    def finish(self, summary: State) -> State:
        fields = self.likelihood.finish(summary)
        return {**fields, "mean": fields["mean"].double() + self.center}

    def prediction(self, fields: State, n_samples: int | Tensor, samples: Tensor | None = None) -> Prediction:
        prediction = self.likelihood.prediction(fields, n_samples)
        if samples is None:
            return prediction
        mean, log_variance = samples.double().unbind(-1)
        return replace(prediction, samples=torch.stack((mean + self.center, log_variance), dim=-1))
