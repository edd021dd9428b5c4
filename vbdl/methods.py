"""The table of methods, which the command line, estimators, `recommend`, `inspect`, the suite and model cards read.

A method is one file in `vbdl/posteriors/` and one entry here. Its class is imported on first use.
"""

import importlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
    takes_trained: bool = False  # whether a trained network can be used without training it again
    training: "Keywords" = field(default_factory=dict)  # arguments of `fit` that suit it on small tables
    old_names: tuple[str, ...] = ()  # former names, which still work with a warning

    @property
    def has_members(self) -> bool:
        """Whether its draws are the members of an ensemble, so that a prediction uses all of them."""
        return "n_members" in self.arguments

    def load(self) -> "type[Posterior]":
        """Import and return the method's class."""
        return vars(importlib.import_module(self.module))[self.class_name]

    def make(self, network: "nn.Module", **known: object) -> "Posterior":
        """Build the posterior over this network, from those of the `known` arguments that the class takes."""
        return self.load()(network, **{name: value for name, value in known.items() if name in self.arguments})


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
    )
}


def words(class_name: str) -> str:
    """What the method of this class is called in a sentence."""
    return next(method.words for method in METHODS.values() if method.class_name == class_name)


def method_of(name: str) -> Method:
    """The method of this name. Raises ValueError for an unknown name, warns (DeprecationWarning) for a former one."""
    if name in METHODS:
        return METHODS[name]
    for method in METHODS.values():
        if name in method.old_names:
            warnings.warn(f"the method {name!r} is called {method.name!r} now", DeprecationWarning, stacklevel=2)
            return method
    raise ValueError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}")
