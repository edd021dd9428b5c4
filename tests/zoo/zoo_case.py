"""A case of the zoo: a network as its users have it, small, and a batch for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.types import Inputs

ROWS = 4
METHODS = ("dropout", "mean-field", "ensemble", "fresh")


@dataclass(frozen=True)
class Case:
    """make: the network, initialized from torch's generator. inputs: number of rows -> a batch.

    likelihood: of "classes", the last axis of the output, or of "numbers", the last axis.
    needs: packages that have to be installed. methods: those that make sense for the network.
    read: the tensor of the outputs that is predicted from. output: what the posterior is told of it.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    likelihood: str = "classes"
    needs: tuple[str, ...] = ()
    methods: tuple[str, ...] = METHODS
    read: Callable[[Any], Tensor] = lambda output: output
    output: str | None = None


def numbers(*shape: int) -> Callable[[int], Tensor]:
    """A function of the number of rows that returns normal numbers, (rows, *shape)."""
    return lambda rows: torch.randn(rows, *shape)


def ids(length: int, n_tokens: int) -> Callable[[int], Tensor]:
    """A function of the number of rows that returns token ids, (rows, length)."""
    return lambda rows: torch.randint(0, n_tokens, (rows, length))


class Then(nn.Module):
    """A network followed by a function of its output."""

    def __init__(self, network: nn.Module, function: Callable[[Any], Tensor]):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.network(x))
