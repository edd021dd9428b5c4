"""The moments of a random tensor, its mean and variance, and the table of rules that propagate them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Rule = Callable[..., object]
R = TypeVar("R", bound=Rule)
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
    return Moments(function(x.mean), function(x.var)) if isinstance(x, Moments) else function(x)


def is_random(values: Sequence[object]) -> bool:
    """True if any of these values is random, or any in the lists and tuples among them."""
    return any(isinstance(v, Moments | Uniform) or (isinstance(v, list | tuple) and is_random(v)) for v in values)
