"""The table of methods, which the command line, estimators, `recommend`, `inspect`, the suite and model cards read.

A method is one file in `vbdl/posteriors/` and one entry here. Its class is imported on first use. `add` makes an entry
for a class of the user's own.
"""

import importlib
import inspect
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that the table does not import torch
    from torch import nn

    from vbdl.types import Keywords, Posterior


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of approximating the posterior over the weights of a network."""

    name: str  # in commands, estimators and the suite: "mc-dropout"
    module: str  # "vbdl.posteriors.mc_dropout"
    class_name: str  # "MCDropout"
    words: str  # in a sentence: "MC dropout"
    when: str  # when to choose it
    arguments: tuple[str, ...]  # constructor arguments after the network that `make` passes on
    dropout: float = 0.1  # dropout rate of the networks that vbdl builds for it
    needs_dropout: bool = False  # whether it refuses a network without dropout
    needs_own_noise: bool = False  # whether it takes only a network that draws by itself, which vbdl never builds
    needs_augmentation: bool = False  # whether it needs changes of inputs that the user knows to keep the target
    takes_trained: bool = False  # whether a trained network can be used without training it again
    collects: bool = False  # whether it is made of the weights of many epochs, and predicts only after `fit`
    stops_early: bool = True  # whether `fit` takes patience= for it
    of_new_networks: "Keywords" = field(default_factory=dict)  # further arguments if the network is not trained
    of_trained_networks: "Keywords" = field(default_factory=dict)  # further arguments if it is, to start from it
    training: "Keywords" = field(default_factory=dict)  # arguments of `fit` that suit it on small tables
    rate: float = 1.0  # its learning rate, as a multiple of one that suits Adam
    is_one_network: bool = False  # whether its only draw is the network itself
    old_names: tuple[str, ...] = ()  # former names, which still work with a warning

    @property
    def has_members(self) -> bool:
        """Whether its draws are the members of an ensemble."""
        return "n_members" in self.arguments

    @property
    def has_fixed_draws(self) -> bool:
        """Whether its draws are few and fixed, so that a prediction uses all of them."""
        return self.has_members or self.is_one_network

    def load(self) -> "type[Posterior]":
        """Import and return the method's class."""
        return vars(importlib.import_module(self.module))[self.class_name]

    def make(self, network: "nn.Module", trained: bool = False, **known: object) -> "Posterior":
        """Build the posterior over this network, trained or not, from the `known` arguments that the class takes."""
        arguments = {name: value for name, value in known.items() if name in self.arguments}
        further = self.of_trained_networks if trained else self.of_new_networks
        return self.load()(network, **{**further, **arguments})


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            name="mc-dropout",
            module="vbdl.posteriors.mc_dropout",
            class_name="MCDropout",
            words="MC dropout",
            when="the network has dropout and is trained already, or there is time to train one network only",
            arguments=("seed",),
            needs_dropout=True,
            takes_trained=True,
            training={"lr": 1e-3, "patience": 40},
            old_names=("dropout",),
        ),
        Method(
            name="mean-field",
            module="vbdl.posteriors.mean_field",
            class_name="MeanField",
            words="mean-field variational inference",
            when="rows are few, fewer than a tenth of the weights or than 1000, so that the prior counts",
            arguments=("n_data", "prior", "initial_std", "seed"),
            dropout=0.0,
            training={"lr": 5e-3, "patience": 60, "kl_warmup": 30, "weight_decay": 0.0},
        ),
        Method(
            name="deep-ensemble",
            module="vbdl.posteriors.ensemble",
            class_name="DeepEnsemble",
            words="deep ensemble",
            when="there are rows enough, and time to train several networks",
            arguments=("n_members", "seed"),
            training={"lr": 1e-3, "patience": 20},
            old_names=("ensemble",),
        ),
        Method(
            name="batch-ensemble",
            module="vbdl.posteriors.batch_ensemble",
            class_name="BatchEnsemble",
            words="BatchEnsemble",
            when="an ensemble is wanted, and several networks take too much memory or time",
            arguments=("n_members", "seed"),
            of_trained_networks={"initial": "normal", "initial_std": 0.1},
            training={"lr": 3e-3, "patience": 20},
        ),
        Method(
            name="masksembles",
            module="vbdl.posteriors.masksembles",
            class_name="Masksembles",
            words="Masksembles",
            when="an ensemble is wanted that takes the memory of one network, each member a part of its units",
            arguments=("n_members", "scale", "seed"),
            dropout=0.0,
            of_trained_networks={"rescale": True},
            training={"lr": 1e-3, "patience": 20},
        ),
        Method(
            name="swag",
            module="vbdl.posteriors.swag",
            class_name="SWAG",
            words="SWAG",
            when="the network is trained, and may be trained for some epochs more",
            arguments=("rank", "collect_from", "swa_lr", "seed"),
            dropout=0.0,
            collects=True,
            training={"lr": 1e-3, "patience": 20},
            of_new_networks={"collect_from": 0.75},
        ),
        Method(
            name="ivon",
            module="vbdl.posteriors.ivon",
            class_name="IVON",
            words="IVON",
            when="a normal for every weight is wanted, for the time and the memory of Adam",
            arguments=("n_data", "seed"),
            dropout=0.0,
            rate=30.0,
            training={"lr": 0.1, "patience": 60, "weight_decay": 0.0, "clip_norm": None},
        ),
        Method(
            name="snapshots",
            module="vbdl.posteriors.snapshots",
            class_name="Snapshots",
            words="snapshot ensemble",
            when="an ensemble is wanted, and there is time to train one network only",
            arguments=("n_members", "seed"),
            collects=True,
            stops_early=False,
            training={"lr": 3e-3},
        ),
        Method(
            name="deterministic",
            module="vbdl.posteriors.deterministic",
            class_name="Deterministic",
            words="the network as it is",
            when="only calibration, decisions or a service are wanted: it knows no epistemic uncertainty",
            arguments=("seed",),
            takes_trained=True,
            is_one_network=True,
            training={"lr": 1e-3, "patience": 20},
        ),
        Method(
            name="laplace",
            module="vbdl.posteriors.laplace",
            class_name="Laplace",
            words="Laplace approximation",
            when="the network is trained already, without dropout, and is not to be trained again",
            arguments=("n_data", "seed"),
            dropout=0.0,
            takes_trained=True,
            training={"lr": 1e-3, "patience": 20},
        ),
        Method(
            name="stochastic",
            module="vbdl.posteriors.stochastic",
            class_name="Stochastic",
            words="stochastic network",
            when="the network draws by itself, by torch's random functions or with layers of a Bayesian library",
            arguments=("n_data", "seed"),
            needs_own_noise=True,
            takes_trained=True,
        ),
        Method(
            name="tta",
            module="vbdl.posteriors.augmentation",
            class_name="TestTimeAugmentation",
            words="test-time augmentation",
            when="the network is trained already, and changes of the inputs are known that leave the target as it is",
            arguments=("seed",),
            needs_augmentation=True,
            takes_trained=True,
        ),
    )
}


def add(
    cls: "type[Posterior]",
    name: str,
    *,
    when: str = "it is your own",
    words: str | None = None,
    arguments: Sequence[str] | None = None,
    dropout: float = 0.0,
    training: "Keywords | None" = None,
    **traits: Any,
) -> Method:
    """Add a method of your own to the table: `@vbdl.register(name=...)` does this for a class.

    cls: the posterior's class, at the top level of a module; its first argument is the network.
    name: what commands and estimators call it, of letters, digits and "-".
    when: when to choose it, and words: what it is called in a sentence; both for people.
    arguments: the constructor's arguments after the network that vbdl may fill in: those it knows are n_data (the
        number of training rows), n_members, prior, initial_std and seed. Default: those the constructor has.
    dropout: the rate of the networks that vbdl builds for it.
    training: arguments of `fit` that suit it on small tables.
    traits: further fields of `Method`, like takes_trained.

    Raises ValueError for a name that is taken or is not made of letters, digits and "-".

    >>> @vbdl.register
    ... class Own(vbdl.MCDropout):
    ...     pass
    >>> vbdl.methods.add(Own, "own-dropout", dropout=0.1, needs_dropout=True).arguments
    ('seed',)
    >>> vbdl.VBDLClassifier(method="own-dropout").method
    'own-dropout'
    """
    if not re.fullmatch(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*", name):
        raise ValueError(f"{name!r} cannot be the name of a method: use letters, digits and '-', like 'mc-dropout'")
    taken = METHODS.get(name) or next((m for m in METHODS.values() if name in m.old_names), None)
    if taken is not None and (taken.module, taken.class_name) != (cls.__module__, cls.__name__):
        raise ValueError(f"the method {name!r} is {taken.module}.{taken.class_name} already: use another name")
    if arguments is None:
        arguments = [n for n in list(inspect.signature(cls).parameters)[1:] if n in _FILLED_IN]
    method = Method(
        name=name,
        module=cls.__module__,
        class_name=cls.__name__,
        words=words or name.replace("-", " "),
        when=when,
        arguments=tuple(arguments),
        dropout=dropout,
        training={"lr": 1e-3, "patience": 20} if training is None else training,
        **traits,
    )
    METHODS[name] = method
    return method


_FILLED_IN = ("n_data", "n_members", "prior", "initial_std", "seed")


def building() -> list[str]:
    """The names of the methods for networks that vbdl builds: those of tables, the estimators and the suite."""
    return [name for name, m in METHODS.items() if not m.needs_own_noise and not m.needs_augmentation]


def words(class_name: str) -> str:
    """What the method of this class is called in a sentence."""
    return next(method.words for method in METHODS.values() if method.class_name == class_name)


def method_of(name: str) -> Method:
    """The method of this name, for a network that vbdl builds.

    Raises ValueError for an unknown name and for a method that needs a network of the user's own, warns
    (DeprecationWarning) for a former name.
    """
    if name in METHODS:
        if METHODS[name].needs_own_noise:
            raise ValueError(
                f"the method {name!r} is for a network that draws by itself, and the networks that vbdl builds do not: "
                f"choose one of {', '.join(building())}, or pass your network to vbdl.{METHODS[name].class_name}"
            )
        if METHODS[name].needs_augmentation:
            raise ValueError(
                f"the method {name!r} needs changes of the inputs that leave the target as it is: choose one of "
                f"{', '.join(building())}, or pass your network and them to vbdl.{METHODS[name].class_name}"
            )
        return METHODS[name]
    for method in METHODS.values():
        if name in method.old_names:
            warnings.warn(f"the method {name!r} is called {method.name!r} now", DeprecationWarning, stacklevel=2)
            return method
    raise ValueError(
        f"there is no method {name!r}: choose one of {', '.join(building())}, or add your own with "
        f"@vbdl.register(name={name!r}) above its class; a command finds it with --plugin FILE"
    )
