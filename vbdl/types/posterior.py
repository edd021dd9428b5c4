"""The base class of every method: a posterior over the parameters of one network."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vbdl.types.likelihood import Likelihood
from vbdl.types.values import Inputs, Json, Output, State


class TrainingRows(Protocol):
    """The training rows of a posterior as batches, which can be passed over several times."""

    own: bool
    """Whether each member of an ensemble has its own rows, so that batches have a leading members axis."""

    @property
    def validation(self) -> tuple[Inputs, Tensor] | None:
        """The held-out inputs and targets, or None if there are none."""
        ...

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield (inputs, targets) as `losses` takes them."""
        ...


_before_training: contextvars.ContextVar[bool] = contextvars.ContextVar("before_training", default=False)


@contextlib.contextmanager
def before_training() -> Iterator[None]:
    """A context in which predictors take posteriors that are not trained yet, as `fit` does to try out the rows."""
    token = _before_training.set(True)
    try:
        yield
    finally:
        _before_training.reset(token)


def check_ready(posterior: "Posterior") -> None:
    """Raise ValueError for a posterior that cannot predict yet, except inside `before_training`."""
    if not _before_training.get():
        posterior.check_ready()


@dataclass(frozen=True)
class Course:
    """What a method asks of the epochs of one training.

    rate: the learning rate as a fraction of that of the optimizer, a function of the epochs done, which counts the
        steps of the running epoch as parts; None leaves it to `fit(schedule=)`.
    collects_from: the number of the first epoch whose weights the posterior is made of, or None if it is made of those
        of one epoch, like most. From there on no epoch is the best one: `fit` stops early only before it.
    """

    rate: Callable[[float], float] | None = None
    collects_from: int | None = None


class Posterior(nn.Module):
    """A trainable distribution over the parameters (or masks) of one module: the base class of every method.

    A method sets `module` and defines `draws` and `losses`; everything else has defaults. The parameters and buffers of
    a posterior are trained, saved in checkpoints and artifacts, and moved to devices like those of any `nn.Module`.

        class Perturbed(Posterior):  # q(w) = N(trained weights, scale^2)
            def __init__(self, network, scale=0.1):
                super().__init__()
                self.module, self.scale = copy.deepcopy(network), scale

            def draws(self, numbers, seed):
                key = make_key(seed, numbers)  # from vbdl_kernels, like `normal`
                noise = lambda i, w: normal(key.to(w.device), i, 0, 1, w.numel()).view(-1, *w.shape)
                return {n: w + self.scale * noise(i, w) for i, (n, w) in enumerate(self.module.named_parameters())}

            def losses(self, x, y, likelihood, own_rows=False):
                return likelihood.training_loss(likelihood(self.module(x)), y).mean().reshape(1)
    """

    module: nn.Module
    """The module to call; a State names its parameters and buffers."""

    n_members: int = 1
    """The number of networks: 1, or the size of the ensemble."""

    n_draws: int | None = None
    """The number of different samples, or None if it is unlimited."""

    kl_weight: float | None = None
    """The weight of the KL term in the loss, which `fit(kl_warmup=...)` raises from 0; None without a KL term."""

    learning_rate: float = 1e-3
    """The learning rate of `fit` unless `lr=` is given."""

    one_by_one: str | None = None
    """The reason why training runs the members one after the other instead of together, or "" or None without one."""

    fits_trained: bool = False
    """Whether `fit` with no epochs has something to do: one pass over the data for a trained network."""

    output: Output = None
    """The output of the network to predict from, if it returns several."""

    lost_hooks: Sequence[str] = ()
    """The parameters whose gradient hooks the copy of the user's network lacks, by name; `fit` refuses them."""

    training_rows: Tensor | None = None
    """Fingerprints of the training rows, (rows,) int64, sorted; set by `fit`. Not a buffer, so that state dicts do not
    change."""

    @property
    def user_network(self) -> nn.Module:
        """The user's network; `module` may be a wrapper around it."""
        return self.module

    @property
    def parts(self) -> Sequence["Posterior"]:
        """Posteriors of one architecture each; (self,) unless members differ in architecture."""
        return (self,)

    @property
    def by_member(self) -> frozenset[str]:
        """The names of the posterior's parameters and buffers with a leading members axis.

        If there are any, training gives each member its own rows, gradient norm, early stopping and likelihood
        parameters. Entries not named here are shared by all members. A shared parameter that is trained gets the sum of
        the members' gradients, which is clipped on its own; training then stops by the loss of the members' mixture.
        """
        return frozenset()

    @property
    def undecayed(self) -> frozenset[str]:
        """The names of the posterior's parameters that weight decay must not shrink, e.g. factors that start at 1.

        It holds for the optimizer of `fit`; a function passed as `optimizer=` gets all parameters in one list.
        """
        return frozenset()

    def config(self) -> Json:
        """The constructor arguments besides the network, as JSON values: `type(self)(network, **config)` builds a copy.

        Loading an artifact fills in the tensors afterwards.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be saved without config(): define this method")

    # -- prediction

    @property
    def prepares(self) -> bool:
        """Whether this posterior has a `prepare` of its own, which predictors call before the first draw."""
        return type(self).prepare is not Posterior.prepare

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The entries of these samples, (samples, ...) each: a pure function of numbers, (samples,) int64, and seed."""
        raise NotImplementedError(f"{type(self).__name__} does not define draws(numbers, seed)")

    def one_draw(self, number: int, seed: int) -> State:
        """The entries of one sample, (...) each: those of `draws`, which a posterior may find in less time."""
        return {name: t[0] for name, t in self.draws(torch.tensor([number]), seed).items()}

    def member_of(self, numbers: Tensor) -> Tensor:
        """The member of each sample, (samples,) int64; numbers: (samples,) int64."""
        return numbers % self.n_members

    def check_ready(self) -> None:
        """Hook called when a predictor is made; raises ValueError if the posterior cannot predict before `fit`."""

    def prepare(self, inputs: Inputs) -> None:
        """Hook called with one batch before prediction, to learn from running the module or to raise an error."""

    # -- training

    def losses(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> Tensor:
        """The training loss of each member, (members,): the mean over its batch, in nats per row.

        own_rows: whether x and y have a leading members axis, one batch per member; only if `by_member` is not empty.
        Then `likelihood.n_members` is set, and each parameter of the likelihood has a leading members axis too.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define losses(x, y, likelihood)")

    def loss(self, x: Inputs, y: Tensor, likelihood: Likelihood) -> Tensor:
        """The sum of the members' losses, (), in nats per row; each member gets the gradient of its own loss."""
        return self.losses(x, y, likelihood).sum()

    def stacked(self) -> State:
        """The entries of `module` that differ between members, (members, ...) each: the tensors, not copies."""
        return {}

    def shared(self) -> State:
        """The entries of `module` that all members share, without a members axis: the tensors, not copies."""
        stacked = self.stacked()
        entries = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {name: t for name, t in entries if name not in stacked}

    def own_optimizer(self, entries: State, others: Sequence[nn.Parameter], lr: float) -> Optimizer | None:
        """The optimizer of a method that has an update rule of its own, or None for the one that `fit` makes.

        `fit` steps it after each gradient, and saves and loads its state dict with the checkpoint. Updates must be
        elementwise, since entries of an ensemble have a leading members axis.

        entries: the trained entries of `module` by name. others: the other trained parameters, as of the likelihood.
        """
        return None

    def of_members(self, members: range) -> "Posterior | None":
        """A posterior of these members alone, whose tensors are parts of this one's: training it trains them.

        Its seeds are those of the members. None if members cannot be trained apart; several processes then share out
        the rows of each batch instead.
        """
        return None

    def course(self, epochs: int, lr: float) -> Course:
        """What this method asks of a training of so many epochs; lr: the optimizer's learning rate.

        Raises ValueError if the method cannot use that many epochs.
        """
        return Course()

    def being_trained(self, on: bool) -> None:
        """Hook called with True when `fit` begins and with False when it ends, also by an error.

        In between, `draws` are those of the weights in training, for methods whose posterior is made afterwards.
        """

    def before_training(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> None:
        """Hook called with the first training batch, to learn from running the module or to raise an error."""

    def after_epoch(self, epoch: int) -> None:
        """Hook called after each epoch's last step, before validation, e.g. to collect the weights."""

    def after_training(self, model: nn.Module, data: TrainingRows) -> None:
        """Hook called once after training, with the final weights, in evaluation mode.

        model: posterior and likelihood as one module, inputs -> parameters of p(y | x) (`vbdl.model.Model`).
        data: the batches of the training rows, as `losses` takes them, and the held-out rows.
        """


def is_posterior(found: object) -> TypeGuard[Posterior]:
    """Whether an object is a `Posterior`."""
    return isinstance(found, Posterior)
