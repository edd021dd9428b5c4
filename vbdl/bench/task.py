"""The types that data sets, methods and the runner exchange: tasks, runs and trained posteriors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from vbdl import former
from vbdl.bench.protocols import Protocol, Published
from vbdl.bench.stacked import stacked_parameters
from vbdl.engine.predictor import Predictor
from vbdl.types import Json, Likelihood, Posterior


class FitOptions(TypedDict, total=False):
    """The arguments of `vbdl.fit` that methods and data sets choose."""

    lr: float
    weight_decay: float
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    schedule: str | None
    kl_warmup: int


class Recipe(FitOptions, total=False):
    """The options of training on a data set without a published protocol."""

    epochs: float
    batch_size: int


class TaskOptions(TypedDict, total=False):
    """The fields of a `Task` beside its rows, network and classes."""

    columns: tuple[str, ...]
    recipe: Recipe
    protocol: Protocol | None
    published: tuple[Published, ...]
    cost: Tensor
    about: str
    notes: tuple[str, ...]


@former.arguments(centre="center")
@dataclass(frozen=True)
class Task:
    """A data set with all its splits stacked, each standardized by its own training part.

    The rows of a split are the training part, whose last fifth a method may use for validation, then held-out rows for
    calibration if there are any, then the test part.
    """

    name: str
    x: Tensor  # (splits, rows, ...) float32
    y: Tensor  # (splits, rows) class indices, or (splits, rows, 1) standardized targets
    n_train: int  # rows of the training part of each split
    network: Callable[[float, int], nn.Module]  # (dropout rate, outputs) -> a fresh network
    classes: tuple[str, ...] = ()  # names of the classes; empty for regression
    scale: tuple[float, ...] = ()  # regression: standard deviation of each split's training targets
    center: tuple[float, ...] = ()  # regression: mean of each split's training targets
    columns: tuple[str, ...] = ()  # names of the features of a table
    recipe: Recipe = field(default_factory=Recipe)  # options of training on this data set
    protocol: Protocol | None = None  # a published protocol that the methods follow
    ood: Mapping[str, Tensor] = field(default_factory=dict)  # out-of-distribution inputs, (splits, rows, ...)
    published: tuple[Published, ...] = ()
    cost: Tensor | None = None  # (classes, classes): cost of deciding for the column's class if the row's is true
    image: tuple[float, float] | None = None  # images: pixel = value * image[0] + image[1], in 0..255
    about: str = ""
    notes: tuple[str, ...] = ()  # differences from the standard data set
    n_held: int = 0  # rows between training and test part that only calibration may use

    centre = former.attribute("centre", "center")

    def __post_init__(self):
        if self.x.shape[:2] != self.y.shape[:2]:
            raise ValueError(
                f"{self.name}: x {tuple(self.x.shape)} and y {tuple(self.y.shape)} must have the same splits and rows"
            )
        if not 1 <= self.n_train < self.x.shape[1]:
            raise ValueError(
                f"{self.name}: n_train must be at least 1 and less than {self.x.shape[1]} rows: {self.n_train}"
            )
        if not self.classes and len(self.scale) != self.n_splits:
            raise ValueError(f"{self.name}: a regression needs the target scale of each of its {self.n_splits} splits")
        if self.x.dtype != torch.float32 or not bool(self.x.isfinite().all()):
            raise ValueError(f"{self.name}: x must be float32 and finite: impute missing values")

    @property
    def n_splits(self) -> int:
        return self.x.shape[0]

    @property
    def regression(self) -> bool:
        return not self.classes

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The inputs and targets of all splits, concatenated: (splits * rows, ...) each."""
        return self.x.flatten(0, 1), self.y.flatten(0, 1)

    def numbers(self, start: int, stop: int) -> Tensor:
        """The indices in `rows` of positions start to stop of each split, (splits, stop - start)."""
        return torch.arange(self.n_splits).unsqueeze(1) * self.x.shape[1] + torch.arange(start, stop)

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """The inputs and targets of the test rows, (splits, rows, ...) each."""
        first = self.n_train + self.n_held
        return self.x[:, first:], self.y[:, first:]

    @property
    def n_test(self) -> int:
        return self.x.shape[1] - self.n_train - self.n_held

    def training(self, split: int) -> tuple[Tensor, Tensor]:
        """The inputs and targets of the training rows of a split, (rows, ...) each."""
        return self.x[split, : self.n_train], self.y[split, : self.n_train]

    def held(self, split: int) -> tuple[Tensor, Tensor]:
        """The inputs and targets of the held-out rows of a split, (rows, ...) each."""
        rows = slice(self.n_train, self.n_train + self.n_held)
        return self.x[split, rows], self.y[split, rows]


@former.arguments(samples="n_samples")
@dataclass
class Run:
    """The options with which a method is run, and what it reports."""

    seed: int = 0
    effort: float = 1.0  # share of the epochs, less than 1 for a quick look
    n_samples: int | None = None  # draws in evaluation, for posteriors with unlimited draws; None: the method's choice
    compile: bool | None = None  # whether to compile training steps; None: if there are enough of them
    folder: Path | None = None  # for checkpoints of long trainings
    networks: Path | None = None  # file of the trained networks that several methods of a run start from
    progress: bool | None = None
    details: Json = field(default_factory=dict)  # reported by the method: chosen rates, times
    notes: list[str] = field(default_factory=list)  # reported by the method: differences from the protocol
    network_seconds: float = 0.0  # reported by the method: seconds that the networks it starts from were trained for
    waited: float = 0.0  # those of them that this method's own training time includes

    samples = former.attribute("samples", "n_samples")

    def epochs(self, whole: float) -> int:
        """The number of epochs at this effort, at least one. whole: the number at effort 1."""
        return max(1, round(whole * self.effort))

    def draws(self, usual: int) -> int:
        """The number of draws in evaluation: `n_samples`, or `usual` if that is None."""
        return usual if self.n_samples is None else self.n_samples

    def checkpoint(self, name: str) -> Path | None:
        """The path of the checkpoint of a training of this name, or None if there is no folder."""
        return None if self.folder is None else self.folder / f"{name}.safetensors"


@former.arguments(samples="n_samples")
@dataclass
class Stacked:
    """A trained posterior for all splits: the members of split 0, then those of split 1, and so on.

    n_samples: draws in evaluation, divided among the members of a split; posteriors with a fixed number of draws use
        each member once.
    """

    posterior: Posterior
    likelihood: Likelihood
    per_split: int = 1
    n_samples: int = 1000
    seed: int = 0

    samples = former.attribute("samples", "n_samples")

    def parameters(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the parameters of p(y | x) in chunks (draws, splits, rows, ...). x: (splits, rows, ...)."""
        return stacked_parameters(self.posterior, self.likelihood, x, self.n_samples, self.per_split, self.seed)


@dataclass
class Each:
    """Trained predictors, one for each split."""

    predictors: Sequence[Predictor]

    def parameters(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the parameters of p(y | x) in one chunk, (draws, splits, rows, ...). x: (splits, rows, ...)."""
        if len(self.predictors) != x.shape[0]:
            raise ValueError(
                f"the method returned {len(self.predictors)} predictors for {x.shape[0]} splits; return one for each"
            )
        splits = []
        for predictor, rows in zip(self.predictors, x, strict=True):
            samples = predictor(rows, samples=True).samples
            assert samples is not None
            splits.append(samples)
        yield torch.stack(splits, dim=1)
