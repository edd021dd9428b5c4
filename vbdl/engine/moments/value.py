"""A random tensor as its mean and variance, and the table of what operations make of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}  # name of an aten operation -> what it makes of moments


@dataclass(frozen=True, eq=False)
class Moments:
    """Elements with these means and variances, independent of each other."""

    mean: Tensor
    var: Tensor  # of the same shape, not negative

    @property
    def shape(self) -> torch.Size:
        return self.mean.shape

    @property
    def ndim(self) -> int:
        return self.mean.ndim


@dataclass(frozen=True, eq=False)
class Uniform:
    """Random words, uniform on 0 to 2^32 - 1: what a mask is made of."""

    shape: tuple[int, ...]
    device: torch.device


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of these operations: the operation's own arguments, some of them Moments."""

    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return enter


def mean_of(x: Any) -> Any:
    """The mean of a random value; a certain one is its own."""
    return x.mean if isinstance(x, Moments) else x


def var_of(x: Any) -> Any:
    """The variance of a random value, 0.0 of a certain one."""
    return x.var if isinstance(x, Moments) else 0.0


def as_moments(x: Moments | Tensor) -> Moments:
    """A certain tensor as moments of variance zero."""
    return x if isinstance(x, Moments) else Moments(x, torch.zeros_like(x))


def each(function: Callable[[Tensor], Tensor], x: Moments | Tensor) -> Moments | Tensor:
    """What a rearrangement of elements makes of both."""
    return Moments(function(x.mean), function(x.var)) if isinstance(x, Moments) else function(x)


def is_random(values: Sequence[Any]) -> bool:
    """Whether any of these arguments, or of the lists in them, is random."""
    return any(isinstance(v, Moments | Uniform) or (isinstance(v, list | tuple) and is_random(v)) for v in values)
