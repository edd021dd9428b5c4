"""The base class of likelihoods: distributions of targets given a network's outputs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vbdl.types.hessian import DenseHessian, OutputHessian
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
    def reads_layer(self) -> str | None:
        """The name of the network's layer whose inputs `with_features` takes, or None if it needs no features."""
        return None

    @property
    def learned_noise(self) -> int:
        """The number of learned noise levels that are the same for every row: one for each output, or 0.

        A Laplace approximation estimates them by its evidence, from `squared_residuals`, and sets them by
        `scale_noise`.
        """
        return 0

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

    def with_features(self, parameters: Tensor, features: Tensor) -> Tensor:
        """The parameters of p(y | x), (batch, ...), with what follows from features: called if `reads_layer` is a name.

        features: (batch, features) float32, the inputs of that layer, the same for every draw.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define with_features(parameters, features)")

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

    def hessian(self, outputs: Tensor, y: Tensor) -> OutputHessian:
        """The Hessian of each row's nll in the network's outputs, positive semi-definite, for a Laplace approximation.

        outputs: (batch, ...) of the network; y: as `check_targets` returns it. By default torch differentiates `nll`
        twice, and negative eigenvalues become 0. A likelihood that knows its Hessian or Fisher information returns it.
        """

        with torch.enable_grad():
            flat = outputs.detach().flatten(1).requires_grad_()
            nll = self.nll(self(flat.view(outputs.shape)), y).sum()
            (gradient,) = torch.autograd.grad(nll, flat, create_graph=True)
            if not gradient.requires_grad:  # nll is linear in the outputs
                return DenseHessian(gradient.new_zeros(*flat.shape, flat.shape[1]))
            # rows do not depend on each other, so the gradient of a sum over rows holds each row's own
            of = lambda one: torch.autograd.grad(one.sum(), flat, retain_graph=True, materialize_grads=True)[0]
            columns = [of(one) for one in gradient.unbind(1)]
        return DenseHessian(torch.stack(columns, dim=-1))

    def squared_residuals(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The squared residuals in units of the noise variance, (batch, outputs), summed over the axes of an output."""
        raise NotImplementedError(f"{type(self).__name__} does not define squared_residuals(parameters, y)")

    def scale_noise(self, factors: Tensor) -> None:
        """Multiply the noise stds by these factors, (outputs,)."""
        raise NotImplementedError(f"{type(self).__name__} does not define scale_noise(factors)")

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
