"""The moments of a random tensor, its mean and variance, and the table of rules that propagate them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vbdl.calling.stacking import along_last

Rule = Callable[..., object]
R = TypeVar("R", bound=Rule)
M = TypeVar("M", bound="Moments")
RULES: dict[str, Rule] = {}  # name of an aten operation -> function from moments to moments


@dataclass(frozen=True, eq=False)
class Moments:
    """A random tensor of independent elements, as the mean and the variance of each."""

    mean: Tensor
    var: Tensor  # the shape of the mean; not negative

    @property
    def shape(self) -> torch.Size:
        return self.mean.shape

    @property
    def ndim(self) -> int:
        return self.mean.ndim

    def tensors(self) -> list[Tensor]:
        """The tensors that it consists of."""
        return [t for t in vars(self).values() if isinstance(t, Tensor)]

    def filled(self: M, tensors: Iterator[Tensor]) -> M:
        """The same with other tensors, in the order of `tensors`."""
        return dataclasses.replace(self, **{n: next(tensors) for n, t in vars(self).items() if isinstance(t, Tensor)})


@dataclass(frozen=True, eq=False)
class Correlated(Moments):
    """A random tensor mean + root e + independent noise, with normals e that its elements share."""

    root: Tensor  # (*shape, normals)
    source: object  # equal for tensors that share e

    @property
    def own(self) -> Tensor:
        """The variance of the independent noise, in the shape of the mean."""
        return (self.var - self.root.square().sum(-1)).clamp_min(0.0)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Correlated":
        """Apply a rearrangement of elements."""
        return Correlated(function(self.mean), function(self.var), along_last(function, self.root), self.source)


@dataclass(frozen=True, eq=False)
class KroneckerWeights(Moments):
    """A random matrix mean + left (std * E) right^T, or a column of it, with E of independent normals.

    mean: (outputs, inputs), or (outputs,) for a column. left: (outputs, p). std: (p, q). right: (inputs, q), or (q,).
    """

    left: Tensor
    std: Tensor
    right: Tensor
    source: object  # equal for parts of one matrix

    def with_mean(self, mean: Tensor) -> "KroneckerWeights":
        """The same deviations from another mean."""
        return dataclasses.replace(self, mean=mean)

    def columns(self, function: Callable[[Tensor], Tensor]) -> "KroneckerWeights":
        """Choose columns by a function of the inputs' axis, the last one of a matrix."""
        right = function(self.right.mT)
        right = right.mT if right.ndim > 1 else right
        return KroneckerWeights(function(self.mean), function(self.var), self.left, self.std, right, self.source)


@dataclass(frozen=True, eq=False)
class Uniform:
    """A tensor of random words, uniform on 0, ..., 2^32 - 1, which dropout masks are computed from."""

    shape: tuple[int, ...]
    device: torch.device


Value = Moments | Tensor | float
"""An argument of an operation: random, or certain."""


def rule(*names: str) -> Callable[[R], R]:
    """A decorator that enters a function into RULES for the aten operations with these names.

    The function takes the operation's own arguments, some of them Moments in place of tensors.
    """

    def enter(function: R) -> R:
        for name in names:
            RULES[name] = function
        return function

    return enter


def mean_of(x: Value) -> Any:  # a tensor, or a float: what meets it is a tensor
    """The mean of x; x itself if it is not random."""
    return x.mean if isinstance(x, Moments) else x


def var_of(x: Value) -> Any:
    """The variance of x; 0.0 if it is not random."""
    return x.var if isinstance(x, Moments) else 0.0


def as_moments(x: Moments | Tensor) -> Moments:
    """x as Moments; a tensor gets variance zero."""
    return x if isinstance(x, Moments) else Moments(x, torch.zeros_like(x))


def each(function: Callable[[Tensor], Tensor], x: Moments | Tensor) -> Moments | Tensor:
    """Apply a rearrangement of elements to x; of Moments, to the mean and to the variance."""
    if isinstance(x, Correlated):
        return x.each(function)
    return Moments(function(x.mean), function(x.var)) if isinstance(x, Moments) else function(x)


def is_random(values: Sequence[object]) -> bool:
    """True if any of these values is random, or any in the lists and tuples among them."""
    return any(isinstance(v, Moments | Uniform) or (isinstance(v, list | tuple) and is_random(v)) for v in values)
