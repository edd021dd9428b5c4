"""What a data set hands to a method, and a method to the runner."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.bench.stacked import stacked_parameters
from vbdl.types import Likelihood, Posterior


@dataclass(frozen=True)
class Published:
    """A column of a published table for one data set."""

    column: str  # "MC dropout 2018"
    method: str  # the registered method it is compared with; "" for reference only
    metric: str  # name of a score: "ll", "rmse", "accuracy"
    mean: float
    standard_error: float  # over the splits, of the published mean
    source: str
    differs: str = ""  # in what the run departs from how the column was made
    per_split: tuple[float, ...] = ()  # on the same splits, where the authors gave them: allows a paired test


@dataclass(frozen=True)
class Task:
    """A data set with all its splits stacked, each standardized by its own training part.

    Rows of a split: the training part first (its last fifth is what a method may validate on), then the test part.
    """

    name: str
    x: Tensor  # (splits, rows, ...) float32
    y: Tensor  # (splits, rows) class numbers, or (splits, rows, 1) standardized targets
    n_train: int  # rows of the training part of each split
    network: Callable[[float, int], nn.Module]  # (dropout rate, outputs) -> a fresh network
    classes: tuple[str, ...] = ()  # names of the classes; empty for regression
    scale: tuple[float, ...] = ()  # regression: target units in one unit of y, a number a split
    centre: tuple[float, ...] = ()  # regression: the training mean, target units
    columns: tuple[str, ...] = ()  # names of the features, where rows are tables
    recipe: Mapping[str, Any] = field(default_factory=dict)  # options of `fit` for this data set
    protocol: Any = None  # a published protocol that the methods follow, vbdl.bench.protocols.Protocol
    ood: Mapping[str, Tensor] = field(default_factory=dict)  # (splits, rows, ...) inputs unlike the training set's
    published: tuple[Published, ...] = ()
    cost: Tensor | None = None  # (classes, classes) of deciding for the column where the row is true
    image: tuple[float, float] | None = None  # images: pixel = value * image[0] + image[1], in 0..255
    about: str = ""
    notes: tuple[str, ...] = ()  # where the data differ from what is standard

    def __post_init__(self):
        if self.x.shape[:2] != self.y.shape[:2]:
            raise ValueError(f"{self.name}: inputs {tuple(self.x.shape)} and targets {tuple(self.y.shape)} disagree")
        if not 1 <= self.n_train < self.x.shape[1]:
            raise ValueError(f"{self.name}: n_train is {self.n_train} of {self.x.shape[1]} rows")
        if not self.classes and len(self.scale) != self.n_splits:
            raise ValueError(f"{self.name}: a regression set gives the target scale of each of its splits")
        if self.x.dtype != torch.float32 or not bool(self.x.isfinite().all()):
            raise ValueError(f"{self.name}: inputs are float32 and finite: impute what is missing")

    @property
    def n_splits(self) -> int:
        return self.x.shape[0]

    @property
    def regression(self) -> bool:
        return not self.classes

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all splits one after the other: (splits * rows, ...)."""
        return self.x.flatten(0, 1), self.y.flatten(0, 1)

    def numbers(self, start: int, stop: int) -> Tensor:
        """(splits, stop - start) row numbers in `rows` of these positions of each split."""
        return torch.arange(self.n_splits).unsqueeze(1) * self.x.shape[1] + torch.arange(start, stop)

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.x[:, self.n_train :], self.y[:, self.n_train :]


@dataclass
class Run:
    """How a method was asked to run."""

    seed: int = 0
    effort: float = 1.0  # share of the epochs, for a quick look
    samples: int | None = None  # draws in evaluation, of posteriors whose draws never end; None: the method's choice
    compile: bool | None = None  # of training steps; None: where there are enough of them
    folder: Path | None = None  # for checkpoints of long trainings
    progress: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)  # what the method found out: chosen rates, times
    notes: list[str] = field(default_factory=list)  # where it departs from the protocol, for the reader of the result

    def epochs(self, whole: float) -> int:
        """The share of these epochs that was asked for, at least one."""
        return max(1, round(whole * self.effort))

    def draws(self, usual: int) -> int:
        """How many draws to evaluate with, where the method would take `usual`."""
        return usual if self.samples is None else self.samples

    def checkpoint(self, name: str) -> Path | None:
        """Where a training of this name may save itself, if anywhere."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"


@dataclass
class Stacked:
    """A trained posterior whose members are those of split 0, then those of split 1, and so on.

    samples: draws in evaluation, shared out over the members of a split; every member where draws end.
    """

    posterior: Posterior
    likelihood: Likelihood
    per_split: int = 1
    samples: int = 1000
    seed: int = 0

    def parameters(self, x: Tensor) -> Iterator[Tensor]:
        """Chunks (draws, splits, rows, ...) of the draws' parameters of p(y | x); x: (splits, rows, ...)."""
        return stacked_parameters(self.posterior, self.likelihood, x, self.samples, self.per_split, self.seed)


@dataclass
class Each:
    """A predictor for each split."""

    predictors: Sequence[Any]

    def parameters(self, x: Tensor) -> Iterator[Tensor]:
        """One chunk (draws, splits, rows, ...)."""
        if len(self.predictors) != x.shape[0]:
            raise ValueError(f"{len(self.predictors)} predictors were returned for {x.shape[0]} splits")
        yield torch.stack([p(own, samples=True).samples for p, own in zip(self.predictors, x, strict=True)], dim=1)
