"""The vocabulary of vbdl: what a posterior, a likelihood and a prediction are. Imports nothing of vbdl.

Axes, everywhere and always in this order: (samples, batch, classes | outputs). Samples are draws of the parameters,
members are the networks of an ensemble. Classification uncertainty is in nats, regression uncertainty is a variance
in squared target units.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

State = dict[str, Tensor]
"""Parameters and buffers by name; stacked when every entry has a leading samples axis."""

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a module is called with: one tensor, positional or keyword arguments. These are tensors or nest tensors
(`vbdl.inputs`); the batch axis is first in each."""


class Posterior(nn.Module):
    """A distribution over the parameters (or masks) of one module, which can be trained: the base of every method.

    A method sets `module`, and defines `draws` and `losses`; the rest has defaults. Its parameters and buffers are
    trained, saved in checkpoints and artefacts, and copied to other devices like those of any `nn.Module`.

        class Perturbed(Posterior):  # q(w) = N(trained weights, scale^2)
            def __init__(self, network, scale=0.1):
                super().__init__()
                self.module, self.scale = copy.deepcopy(network), scale

            def draws(self, numbers, seed):
                key = make_key(seed, numbers)  # of vbdl_kernels, like `normal`
                noise = lambda i, w: normal(key.to(w.device), i, 0, 1, w.numel()).view(-1, *w.shape)
                return {n: w + self.scale * noise(i, w) for i, (n, w) in enumerate(self.module.named_parameters())}

            def losses(self, x, y, likelihood, own_rows=False):
                return likelihood.training_loss(likelihood(self.module(x)), y).mean().reshape(1)
    """

    module: nn.Module
    """The module to call; the names in a State are names of its parameters and buffers."""

    n_members: int = 1
    """Networks held: 1, or the size of the ensemble."""

    n_draws: int | None = None
    """How many different samples there are; None where they never end."""

    kl_weight: float | None = None
    """Weight of the KL term in the loss, which `fit(kl_warmup=...)` raises from 0; None where there is no such term."""

    lost_hooks: Sequence[str] = ()
    """Parameters of the user's network with hooks of their gradients, which its copy does not carry: `fit` refuses."""

    training_rows: Tensor | None = None
    """Fingerprints of the rows it was trained on, (rows,) int64 sorted; set by `fit`. No buffer, so that state dicts of
    networks stay as they are."""

    @property
    def user_network(self) -> nn.Module:
        """The user's network, around which `module` may add its own."""
        return self.module

    @property
    def parts(self) -> Sequence["Posterior"]:
        """Posteriors over one architecture each; (self,) unless members differ in architecture."""
        return (self,)

    @property
    def by_member(self) -> frozenset[str]:
        """Names of its parameters and buffers with a leading members axis.

        Where there are any, training gives each member its own rows, its own gradient norm, its own early stopping and
        its own parameters of the likelihood. What members share is not named here, and belongs to all.
        """
        return frozenset()

    def config(self) -> dict[str, Any]:
        """The arguments, beside the network, that make it again: `type(self)(network, **config)`, as JSON holds them.

        Tensors are filled in from the artefact afterwards.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is made: define config(), to save it")

    # -- prediction

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The samples of these numbers: (samples,) int64 -> entries (samples, ...). A pure function of both."""
        raise NotImplementedError(f"{type(self).__name__} does not define draws(numbers, seed)")

    def member_of(self, numbers: Tensor) -> Tensor:
        """The member that each of these samples belongs to: (samples,) int64 -> (samples,) int64"""
        return numbers % self.n_members

    def prepare(self, inputs: Inputs) -> None:
        """Look at one batch before prediction: find what can only be found by running, or raise."""

    # -- training

    def losses(self, x: Inputs, y: Tensor, likelihood: "Likelihood", own_rows: bool = False) -> Tensor:
        """(members,) what training minimizes, each member's: mean over its batch, nats a row.

        own_rows: x and y have a leading members axis, a batch for each; only where `by_member` names something. Then
        `likelihood.n_members` is set, and each of its parameters has a leading members axis too.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define losses(x, y, likelihood)")

    def loss(self, x: Inputs, y: Tensor, likelihood: "Likelihood") -> Tensor:
        """The losses summed over members, so that the gradient of each is its own: a scalar, nats a row."""
        return self.losses(x, y, likelihood).sum()

    def stacked(self) -> State:
        """Entries of `module` that each member has of its own, (members, ...) each: the tensors that are trained."""
        return {}

    def shared(self) -> State:
        """Entries of `module` that members share, held once: the tensors that are trained."""
        own = self.stacked()
        entries = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {name: t for name, t in entries if name not in own}

    def before_training(self, x: Inputs, y: Tensor, likelihood: "Likelihood", own_rows: bool = False) -> None:
        """Look at the first batch of a training: find what can only be found by running, or raise."""

    def after_epoch(self, epoch: int) -> None:
        """Called after each epoch's last step, before its validation: collect the weights, for instance."""

    def after_training(self, model: nn.Module, data: Iterable[tuple[Inputs, Tensor]]) -> None:
        """Called once when training has ended, with the weights that are kept, in evaluation mode.

        model: posterior and likelihood as one module, inputs -> parameters of p(y | x) (`vbdl.model.Model`).
        data: the batches of the training rows, as `losses` takes them.
        """


def is_posterior(found: object) -> TypeGuard[Posterior]:
    """Whether it is a method made of `Posterior`."""
    return isinstance(found, Posterior)


class Prediction(Protocol):
    """A posterior predictive, batch first, frozen."""

    n_samples: int
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


class Likelihood(nn.Module):
    """How a network's outputs become p(y | x): a module whose forward maps outputs to parameters of p.

    Parameters are what `nll` and `summarize` take, so that anything learned or calibrated about
    p(y | x) lives in forward, and is stacked, traced and compiled with the network.
    """

    n_members: int | None = None
    """Members of an ensemble that have parameters of their own here: each parameter has a leading members axis.
    None where all share them. Buffers are shared always."""

    @property
    def wrapped(self) -> "Likelihood | None":
        """The likelihood that this one changes (a calibration, a decision, a shift of the targets), or None."""
        return None

    @property
    def innermost(self) -> "Likelihood":
        """The likelihood that was trained, inside everything that wraps it."""
        return self if self.wrapped is None else self.wrapped.innermost

    def forward(self, outputs: Tensor) -> Tensor:
        """(batch, ...) network outputs -> (batch, ...) parameters of p(y | x)"""
        raise NotImplementedError(f"{type(self).__name__} does not define forward(outputs)")

    def check_targets(self, y: Tensor, parameters_shape: Sequence[int]) -> Tensor:
        """y in the dtype and shape `nll` needs, or ValueError that says what is wrong and what to do."""
        raise NotImplementedError(f"{type(self).__name__} does not define check_targets(y, parameters_shape)")

    def nll(self, parameters: Tensor, y: Tensor) -> Tensor:
        """-log p(y | parameters) in nats, summed over everything but the batch: (batch,)"""
        raise NotImplementedError(f"{type(self).__name__} does not define nll(parameters, y)")

    def training_loss(self, parameters: Tensor, y: Tensor) -> Tensor:
        """What training minimizes in place of `nll`, where that is another thing: (batch,)"""
        return self.nll(parameters, y)

    def summarize(self, parameters: Tensor) -> State:
        """(samples, batch, ...) -> statistics of these samples that `merge` can add to others'."""
        raise NotImplementedError(f"{type(self).__name__} does not define summarize(parameters)")

    def merge(self, a: State, b: State) -> State:
        """Statistics of the union of two sets of samples."""
        raise NotImplementedError(f"{type(self).__name__} does not define merge(a, b)")

    def finish(self, summary: State) -> State:
        """The fields of the prediction, in plain torch."""
        raise NotImplementedError(f"{type(self).__name__} does not define finish(summary)")

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> Any:
        """The prediction of these fields; samples: (samples, batch, ...) parameters, where asked for."""
        raise NotImplementedError(f"{type(self).__name__} does not define prediction(fields, n_samples)")

    def for_draws(self, n: int) -> None:
        """Told by the predictor how many draws there will be at most, before any is summarized."""


def check_likelihood(found: object) -> None:
    """TypeError for anything but a `Likelihood`, like its class, or a loss of torch."""
    if not isinstance(found, Likelihood):
        what = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise TypeError(
            f"a likelihood is vbdl.Categorical(), Bernoulli(), Gaussian() or another that inherits "
            f"vbdl.types.Likelihood, got {what}"
        )
