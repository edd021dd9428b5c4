"""The vocabulary of vbdl: what a posterior, a likelihood and a prediction are. Imports nothing of vbdl.

Axes, everywhere and always in this order: (samples, batch, classes | outputs). Samples are draws of the parameters,
members are the networks of an ensemble. Classification uncertainty is in nats, regression uncertainty is a variance
in squared target units.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

State = dict[str, Tensor]
"""Parameters and buffers by name; stacked when every entry has a leading samples axis."""

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a module is called with: one tensor, positional tensors or keyword tensors, the batch axis first in each."""


class Posterior(Protocol):
    """A distribution over the parameters (or masks) of one module, as an `nn.Module` that can be trained."""

    @property
    def module(self) -> nn.Module:
        """The module to call; the names in a State are names of its parameters and buffers."""
        ...

    @property
    def n_members(self) -> int:
        """Networks held: 1, or the size of the ensemble. Sample s belongs to member s % n_members."""
        ...

    @property
    def n_draws(self) -> int | None:
        """How many different samples there are; None where they never end."""
        ...

    @property
    def parts(self) -> Sequence["Posterior"]:
        """Posteriors over one architecture each; (self,) unless members differ in architecture."""
        ...

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The samples of these numbers: (samples,) int64 -> entries (samples, ...). A pure function of both."""
        ...

    def prepare(self, inputs: Inputs) -> None:
        """Look at one batch before prediction: find what can only be found by running, or raise."""
        ...

    def loss(self, x: Inputs, y: Tensor, likelihood: Any) -> Tensor:
        """What training minimises, a scalar: mean over the batch, summed over members. Nats per row."""
        ...


def is_posterior(found: object) -> TypeGuard[Posterior]:
    """Whether it has every member of `Posterior`.

    Not `isinstance`: from Python 3.12 a protocol looks past `nn.Module.__getattr__`, which holds submodules.
    """
    return isinstance(found, nn.Module) and all(hasattr(found, n) for n in vars(Posterior) if not n.startswith("_"))


class Prediction(Protocol):
    """A posterior predictive, batch first, frozen."""

    n_samples: int
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


class Likelihood(Protocol):
    """How a network's outputs become p(y | x): an `nn.Module` whose forward maps outputs to parameters of p.

    Parameters are what `nll` and `summarize` take, so that anything learned or calibrated about
    p(y | x) lives in forward, and is stacked, traced and compiled with the network.
    """

    def forward(self, outputs: Tensor) -> Tensor:
        """(batch, ...) network outputs -> (batch, ...) parameters of p(y | x)"""
        ...

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        """y in the dtype and shape `nll` needs, or ValueError that says what is wrong and what to do."""
        ...

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """-log p(y | parameters) in nats, summed over everything but the batch: (batch,)"""
        ...

    def summarize(self, parameters: Tensor) -> State:
        """(samples, batch, ...) -> statistics of these samples that `merge` can add to others'."""
        ...

    def merge(self, a: State, b: State) -> State:
        """Statistics of the union of two sets of samples."""
        ...

    def finish(self, summary: State) -> State:
        """The fields of the prediction, in plain torch."""
        ...

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        """What training minimises in place of `nll`, where that is another thing: (batch,)"""
        ...

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> Any:
        """The prediction of these fields; samples: (samples, batch, ...) parameters, where asked for."""
        ...


def check_likelihood(found: object) -> None:
    """TypeError for anything without the members of `Likelihood`, like its class, or a loss of torch."""
    needed = [n for n in vars(Likelihood) if not n.startswith("_")]
    if not isinstance(found, nn.Module) or not all(hasattr(found, n) for n in needed):
        what = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise TypeError(
            f"a likelihood is vbdl.Categorical(), Bernoulli(), Gaussian() or another with their methods, got {what}"
        )
