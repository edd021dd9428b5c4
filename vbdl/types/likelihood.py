"""The base class of likelihoods: distributions of targets given a network's outputs."""

from collections.abc import Sequence

from torch import Tensor, nn

from vbdl.types.prediction import Prediction
from vbdl.types.values import State


class Likelihood(nn.Module):
    """A distribution p(y | x) of targets: a module whose forward maps a network's outputs to parameters of p.

    `nll` and `summarize` take these parameters, so that everything learned or calibrated about p(y | x) is part of
    forward, which is stacked, traced and compiled with the network.
    """

    n_members: int | None = None
    """The number of ensemble members with their own parameters here: each parameter then has a leading members axis.
    None if all members share the parameters. Buffers are always shared."""

    @property
    def wrapped(self) -> "Likelihood | None":
        """The likelihood inside this one if this is a wrapper (calibration, decision, centered targets), or None."""
        return None

    @property
    def innermost(self) -> "Likelihood":
        """The likelihood that was trained, inside all wrappers."""
        return self if self.wrapped is None else self.wrapped.innermost

    def forward(self, outputs: Tensor) -> Tensor:
        """The parameters of p(y | x), (batch, ...); outputs: (batch, ...) of the network."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward(outputs)")

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        """The targets in the dtype and shape that `nll` needs. Raises ValueError for invalid targets.

        parameters_shape: (batch, ...) shape of the parameters of p(y | x).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define check_targets(y, parameters_shape)")

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The negative log-likelihood -log p(y | parameters), (batch,), in nats, summed over all axes but the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define nll(parameters, y)")

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The loss that training minimizes, (batch,): `nll` unless overridden."""
        return self.nll(parameters, y)

    def summarize(self, parameters: Tensor) -> State:
        """The statistics of these samples, which `merge` can combine; parameters: (samples, batch, ...)."""
        raise NotImplementedError(f"{type(self).__name__} does not define summarize(parameters)")

    def merge(self, a: State, b: State) -> State:
        """The statistics of the union of two sets of samples, from the statistics of each."""
        raise NotImplementedError(f"{type(self).__name__} does not define merge(a, b)")

    def finish(self, summary: State) -> State:
        """The fields of the prediction from the statistics of all samples, in plain torch."""
        raise NotImplementedError(f"{type(self).__name__} does not define finish(summary)")

    def prediction(self, fields: State, n_samples: int | Tensor, samples: Tensor | None = None) -> Prediction:
        """The prediction with these fields; samples: (samples, batch, ...) parameters of p(y | x), if requested."""
        raise NotImplementedError(f"{type(self).__name__} does not define prediction(fields, n_samples)")

    def for_draws(self, n: int) -> None:
        """Hook called by the predictor with the largest number of draws, before any is summarized."""


def check_likelihood(found: object) -> None:
    """Raise TypeError for anything but an instance of `Likelihood`, e.g. for its class or a torch loss."""
    if not isinstance(found, Likelihood):
        kind = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise TypeError(
            f"a likelihood must be vbdl.Categorical(), Bernoulli(), Gaussian() or another instance of "
            f"vbdl.types.Likelihood, got {kind}"
        )
