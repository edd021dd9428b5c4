"""The networks of `benchmarks/networks.py`, written as their users write them, with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.types import Likelihood

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Network:
    """A network of the benchmark, its inputs, and the methods that it is measured with."""

    name: str
    title: str
    build: Build  # initializes from torch's generator
    inputs: Callable[[int], Any]  # number of rows -> a batch
    likelihood: Callable[[], Likelihood]
    methods: tuple[str, ...]
    n_members: int = 5
    n_draws: int = 16


def numbers(*shape: int) -> Callable[[int], Tensor]:
    """A function of the number of rows that returns normal numbers, (rows, *shape)."""
    return lambda rows: torch.randn(rows, *shape)


def ids(length: int, n_tokens: int) -> Callable[[int], Tensor]:
    """A function of the number of rows that returns token ids, (rows, length)."""
    return lambda rows: torch.randint(0, n_tokens, (rows, length))
