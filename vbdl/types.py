"""The base classes of vbdl: posterior, likelihood, prediction, calibrator and decision. Imports nothing of vbdl.

Axes are always in this order: (samples, batch, classes | outputs). Samples are draws of the parameters, members are
the networks of an ensemble. Classification uncertainty is in nats, regression uncertainty is a variance in squared
target units.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeGuard

from torch import Tensor, nn

State = dict[str, Tensor]
"""Parameters and buffers by name; stacked when every entry has a leading samples axis."""

Json = dict[str, Any]
"""An object as JSON holds it: texts, numbers, None, lists and objects, by name."""

Arguments = Sequence[Any]
"""Positional arguments of a call, which checks them."""

Keywords = dict[str, Any]
"""Keyword arguments of a call, which checks them."""

Nested = Tensor | Sequence["Nested"] | Mapping[str, "Nested"] | str | bool | None
"""A value that a module is called with: tensors, and what they are nested in and with."""

Inputs = Tensor | Sequence["Nested"] | Mapping[str, "Nested"]
"""The inputs of a module: one tensor, or positional or keyword arguments. Arguments are tensors or nested structures of
tensors (`vbdl.calling.inputs`), each with the batch axis first."""


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
        parameters. Entries not named here are shared by all members.
        """
        return frozenset()

    def config(self) -> Json:
        """The constructor arguments besides the network, as JSON values: `type(self)(network, **config)` builds a copy.

        Loading an artifact fills in the tensors afterwards.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be saved without config(): define this method")

    # -- prediction

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The entries of these samples, (samples, ...) each: a pure function of numbers, (samples,) int64, and seed."""
        raise NotImplementedError(f"{type(self).__name__} does not define draws(numbers, seed)")

    def member_of(self, numbers: Tensor) -> Tensor:
        """The member of each sample, (samples,) int64; numbers: (samples,) int64."""
        return numbers % self.n_members

    def prepare(self, inputs: Inputs) -> None:
        """Hook called with one batch before prediction, to learn from running the module or to raise an error."""

    # -- training

    def losses(self, x: Inputs, y: Tensor, likelihood: "Likelihood", own_rows: bool = False) -> Tensor:
        """The training loss of each member, (members,): the mean over its batch, in nats per row.

        own_rows: whether x and y have a leading members axis, one batch per member; only if `by_member` is not empty.
        Then `likelihood.n_members` is set, and each parameter of the likelihood has a leading members axis too.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define losses(x, y, likelihood)")

    def loss(self, x: Inputs, y: Tensor, likelihood: "Likelihood") -> Tensor:
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

    def before_training(self, x: Inputs, y: Tensor, likelihood: "Likelihood", own_rows: bool = False) -> None:
        """Hook called with the first training batch, to learn from running the module or to raise an error."""

    def after_epoch(self, epoch: int) -> None:
        """Hook called after each epoch's last step, before validation, e.g. to collect the weights."""

    def after_training(self, model: nn.Module, data: Iterable[tuple[Inputs, Tensor]]) -> None:
        """Hook called once after training, with the final weights, in evaluation mode.

        model: posterior and likelihood as one module, inputs -> parameters of p(y | x) (`vbdl.model.Model`).
        data: the batches of the training rows, as `losses` takes them.
        """


def is_posterior(found: object) -> TypeGuard[Posterior]:
    """Whether an object is a `Posterior`."""
    return isinstance(found, Posterior)


OUTCOMES = ("sets", "lower", "upper", "action", "risk", "var", "es")
"""The fields of a prediction that calibrators and decisions add."""


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
    risk: Tensor | None = None  # (batch,) the number by which the action was chosen
    var: Tensor | None = None  # (batch, ...) value at risk
    es: Tensor | None = None  # (batch, ...) expected shortfall

    # Each of these is a field of some subclasses and a property of others, so it is no field here.
    mean: ClassVar[Tensor]  # (batch, ...) E[y], or the probabilities of classes; every prediction has it
    probs: ClassVar[Tensor | None] = None  # (batch, ..., classes), or (batch, ...) p(y = 1); None in a regression
    label: ClassVar[Tensor | None] = None  # (batch, ...) the most probable class
    confidence: ClassVar[Tensor | None] = None  # (batch, ...) probability of the label
    std: ClassVar[Tensor | None] = None  # (batch, ...) predictive standard deviation
    recalibration: ClassVar["Recalibration | None"] = None  # the calibrator's map of the distribution function

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


class Recalibration(Protocol):
    """An increasing map of a distribution function F, as a map of normal scores ⁻(F), in float64."""

    def score(self, score: Tensor) -> Tensor:
        """The calibrated normal score from that of the predictive distribution, any shape."""
        ...

    def inverse(self, score: Tensor) -> Tensor:
        """The normal score of the predictive distribution from the calibrated one, any shape."""
        ...

    def log_slope(self, score: Tensor) -> Tensor:
        """The log of the factor that the map multiplies the density by at this normal score of the predictive."""
        ...


class Calibrator(nn.Module):
    """A correction of predictions, fitted on rows that training never saw. Subclass it to write a calibrator.

    acts_on names the stage of a prediction that the calibrator corrects:

    * "logits": each draw's class logits, before they are averaged. `fit` takes logits (samples, batch, classes),
      `forward` maps logits of any shape (..., classes).
    * "probs": the averaged class probabilities. `fit` and `forward` take (batch, classes), or (batch,) p(y = 1).
    * "prediction": the finished prediction, which `fit_prediction` takes; `fields`, `samples` and `recalibration`
      correct its fields, its draws and its distribution function.

    Everything but `fit` and `fit_prediction` is plain torch, traced and compiled with the network. Fitted numbers are
    buffers; constructor arguments are attributes of the same name, which saving reads.
    """

    acts_on: str = "prediction"
    of_classes: bool = False
    """For "prediction": True to correct predictions of classes, False for regressions."""
    needs_samples: bool = False
    """For "prediction": whether `fit_prediction` reads prediction.samples, or a density or quantile."""
    changes_samples: bool = False
    """For "prediction": whether `samples` changes the draws."""
    one_logit: bool = False
    """For "logits": whether it can also calibrate the logit of a binary target, which `fit` takes as (0, logit)."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def recalibration(self) -> Recalibration | None:
        """The map of the distribution function of a regression, or None if it does not change."""
        return None

    def fit(self, outputs: Tensor, y: Tensor) -> Self:
        """Fit to float64 outputs of this stage and (batch,) int64 classes, and return self."""
        raise NotImplementedError(f'{type(self).__name__} acts on "{self.acts_on}" and needs a method fit(outputs, y)')

    def fit_prediction(self, prediction: Prediction, y: Tensor) -> Self:
        """Fit to a prediction of the calibration rows and their targets, and return self."""
        raise NotImplementedError(f"{type(self).__name__} needs a method fit_prediction(prediction, y)")

    def fields(self, fields: State) -> State:
        """The corrected fields of the prediction; may add `sets`, or `lower` and `upper`."""
        return fields

    def samples(self, samples: Tensor) -> Tensor:
        """The draws of the calibrated prediction; samples: (samples, batch, ...) parameters of p(y | x)."""
        return samples


class Decision(nn.Module):
    """A map from predictions to actions in plain torch, compiled with the predictor. Subclass it to write a decision.

    forward(prediction) returns (batch,) actions, or {"action": ..., and any of "risk", "var", "es"}. The prediction
    holds probs and label, or mean, and total, aleatoric and epistemic.
    """

    reads_distribution: bool = False
    """Whether it reads prediction.distribution, the calibrated predictive distribution of a regression; all draws are
    then kept."""
    reads_draws: bool = False
    """Whether it reads prediction.per_draw, the mean over the draws of the result of `per_draw`. If a calibrator
    changed the draws, the prediction has `distribution` instead."""

    def __init__(self) -> None:
        super().__init__()

    def per_draw(self, parameters: Tensor) -> Tensor:
        """One number per draw and row, (samples, batch), for decisions that read draws.

        parameters: (samples, batch, ...) of p(y | x).
        """
        raise NotImplementedError(f"{type(self).__name__} reads draws and needs a method per_draw(parameters)")

    @property
    def caution(self) -> str | None:
        """The warning to give when this decision is put on a predictor, or None."""
        return None
