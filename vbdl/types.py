"""The vocabulary of vbdl: what a posterior, a likelihood and a prediction are. Imports nothing of vbdl.

Axes, everywhere and always in this order: (samples, batch, classes | outputs). Samples are draws of the parameters,
members are the networks of an ensemble. Classification uncertainty is in nats, regression uncertainty is a variance
in squared target units.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeGuard

from torch import Tensor, nn

State = dict[str, Tensor]
"""Parameters and buffers by name; stacked when every entry has a leading samples axis."""

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a module is called with: one tensor, positional or keyword arguments. These are tensors or nest tensors
(`vbdl.calling.inputs`); the batch axis is first in each."""


class Posterior(nn.Module):
    """A distribution over the parameters (or masks) of one module, which can be trained: the base of every method.

    A method sets `module`, and defines `draws` and `losses`; the rest has defaults. Its parameters and buffers are
    trained, saved in checkpoints and artifacts, and copied to other devices like those of any `nn.Module`.

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

        Tensors are filled in from the artifact afterwards.
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


OUTCOMES = ("sets", "lower", "upper", "action", "risk", "var", "es")
"""The fields of a prediction that calibrators and decisions add."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a predictor returns: p(y | x) of some rows as tensors, the batch axis first.

    A likelihood's own prediction class inherits from it, as a frozen dataclass with keyword fields. Everything that the
    library reads of a prediction has a name here; None means that this kind of prediction has no such value.
    """

    n_samples: int | Tensor  # draws; (batch,) where rows were drawn for until they were settled
    total: Tensor  # (batch, ...) uncertainty: nats for classes, a variance in squared target units for regressions
    aleatoric: Tensor  # (batch, ...) the part that more training data would not remove
    epistemic: Tensor  # (batch, ...) the part that it would
    standard_error: Tensor | None = None  # Monte Carlo standard error of the mean
    samples: Tensor | None = None  # (samples, batch, ...) parameters of p(y | x) of each draw, where asked for
    # added by calibrators
    sets: Tensor | None = None  # (batch, classes) bool, which classes a conformal set holds
    lower: Tensor | None = None  # (batch, ...) bounds of the conformal interval
    upper: Tensor | None = None
    # added by decisions
    action: Tensor | None = None  # (batch,) what to do
    risk: Tensor | None = None  # (batch,) the number that the action rests on
    var: Tensor | None = None  # (batch, ...) value at risk
    es: Tensor | None = None  # (batch, ...) expected shortfall

    # Each of these is a field of some prediction classes and a property of others, so it is no field here.
    mean: ClassVar[Tensor]  # (batch, ...) E[y], or the probabilities of classes; every prediction has it
    probs: ClassVar[Tensor | None] = None  # (batch, ..., classes), or (batch, ...) of yes; None in a regression
    label: ClassVar[Tensor | None] = None  # (batch, ...) the most probable class
    confidence: ClassVar[Tensor | None] = None  # (batch, ...) its probability
    std: ClassVar[Tensor | None] = None  # (batch, ...) predictive standard deviation
    recalibration: ClassVar["Recalibration | None"] = None  # what a calibrator has made of the distribution function

    @property
    def parameters_shape(self) -> tuple[int, ...]:
        """(batch, ...) shape of one draw's parameters of p(y | x), which `check_targets` is given; override where the
        parameters are not of the shape of the mean."""
        return tuple(self.mean.shape if self.samples is None else self.samples.shape[1:])

    def values(self) -> dict[str, Tensor]:
        """Every per-row value that this prediction has, by name: what answers and files are written from."""
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
        """(batch,) log p(y | x) in nats."""
        raise NotImplementedError(f"{type(self).__name__} has no density; give it a method log_prob(y)")

    def cdf(self, y: Tensor) -> Tensor:
        """(batch, ...) probability of at most y."""
        raise NotImplementedError(f"{type(self).__name__} has no distribution function; give it a method cdf(y)")

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """(batch, ...) bounds of the central interval that holds y with this probability."""
        raise NotImplementedError(f"{type(self).__name__} has no intervals; give it a method interval(level)")


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

    def prediction(self, fields: State, n_samples: int, samples: Tensor | None = None) -> Prediction:
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


class Recalibration(Protocol):
    """An increasing map of a distribution function F, between normal scores Φ⁻¹(F), in float64."""

    def score(self, score: Tensor) -> Tensor:
        """Normal score of the predictive, any shape -> calibrated normal score."""
        ...

    def inverse(self, score: Tensor) -> Tensor:
        """Calibrated normal score, any shape -> normal score of the predictive."""
        ...

    def log_slope(self, score: Tensor) -> Tensor:
        """The log of what the map multiplies the density with where the predictive has this normal score."""
        ...


class Calibrator(nn.Module):
    """A correction of predictions, fitted on rows that training never saw. Inherit from it to write one.

    acts_on says which stage of a prediction it corrects:

    * "logits": each draw's class logits, before they are averaged. `fit` is given logits (samples, batch, classes),
      `forward` maps logits of any shape (..., classes).
    * "probs": the averaged class probabilities. `fit` and `forward` are given (batch, classes), or (batch,) of yes.
    * "prediction": the finished prediction. `fit_prediction` is given it; `fields`, `samples` and `recalibration` say
      what becomes of its fields, of its draws and of its distribution function.

    Everything but `fit` and `fit_prediction` is plain torch, traced and compiled with the network. Fitted numbers are
    buffers; what the constructor was given is kept under the names of its arguments, which storage reads.
    """

    acts_on: str = "prediction"
    of_classes: bool = False
    """For "prediction": whether it corrects predictions of classes. False: of regressions."""
    needs_samples: bool = False
    """For "prediction": whether `fit_prediction` reads prediction.samples, or a density or quantile made of them."""
    changes_samples: bool = False
    """For "prediction": whether `samples` changes them."""
    one_logit: bool = False
    """For "logits": whether it can also calibrate the one logit of yes and no, which `fit` is given as (0, logit)."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def recalibration(self) -> Recalibration | None:
        """What becomes of the distribution function of a regression; None where it stays."""
        return None

    def fit(self, outputs: Tensor, y: Tensor) -> Self:
        """Fit to float64 outputs of this stage and (batch,) int64 classes; returns self."""
        raise NotImplementedError(f'{type(self).__name__} acts on "{self.acts_on}" and needs a method fit(outputs, y)')

    def fit_prediction(self, prediction: Prediction, y: Tensor) -> Self:
        """Fit to a prediction of the calibration rows and their targets; returns self."""
        raise NotImplementedError(f"{type(self).__name__} needs a method fit_prediction(prediction, y)")

    def fields(self, fields: State) -> State:
        """The fields of the prediction, changed, or with `sets`, or `lower` and `upper`, added."""
        return fields

    def samples(self, samples: Tensor) -> Tensor:
        """The draws of the calibrated predictive: (samples, batch, ...) parameters of p(y | x) -> the same shape."""
        return samples


class Decision(nn.Module):
    """A map from predictions to actions in plain torch, compiled with the predictor. Inherit from it to write one.

    forward(prediction) returns (batch,) actions, or {"action": ..., and any of "risk", "var", "es"}. It is given
    what the prediction knows: probs and label, or mean; total, aleatoric, epistemic.
    """

    reads_distribution: bool = False
    """Whether it reads prediction.distribution, the calibrated predictive of a regression: every draw is then kept."""
    reads_draws: bool = False
    """Whether it reads prediction.per_draw, the mean over the draws of what `per_draw` makes of each. If a calibrator
    has changed the draws, prediction.distribution is given in its place."""

    def __init__(self) -> None:
        super().__init__()

    def per_draw(self, parameters: Tensor) -> Tensor:
        """(samples, batch, ...) parameters of p(y | x) -> (samples, batch), for decisions that read draws."""
        raise NotImplementedError(f"{type(self).__name__} reads draws and needs a method per_draw(parameters)")

    @property
    def caution(self) -> str | None:
        """What the user is warned of when this decision is put on a predictor."""
        return None
