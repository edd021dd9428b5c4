"""Networks that draw from a key: the wrappers of MC dropout and mean-field inference around a user's network."""

from collections.abc import Hashable, Mapping
from typing import Self

from torch import Tensor, nn

from vbdl.nn.frozen import hold_frozen


class KeyedNetwork(nn.Module):
    """A network whose forward is a pure function of its inputs, its parameters and its `key`.

    inner: the user's network.
    key: (2,) int64 buffer, (seed, draw), from which everything random is drawn.
    rate: overrides the dropout rates of `inner`, all of them or by module name.
    kept: values that follow from the key alone, such as masks and drawn weights, by a name: the forward adds what it
        makes and reads what is there. None: the forward makes them anew.
    steps: (number of the first step, number of steps) if the inputs are a part of longer sequences.
    """

    draws_weights: bool = False  # whether the key draws weights, so that a graph may draw the outputs of layers instead
    row_by_row: bool = False  # whether the forward runs one row after the other
    inner: nn.Module
    key: Tensor
    rate: float | Mapping[str, float] | None = None
    kept: dict[Hashable, Tensor] | None = None
    steps: tuple[int, int] | None = None

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen layers keep their statistics in both."""
        super().train(mode)
        if mode:
            hold_frozen(self.inner)
        return self

    @property
    def takes_many_keys(self) -> bool:
        """Whether `key` may hold several draws, (draws, 2), for inputs that repeat the batch once for each draw."""
        return False

    def regularization(self, key: Tensor) -> Tensor | None:
        """The regularization that the loss of a row adds for a draw, in nats (e.g. the KL term), or None."""
        return None

    def adopt(self, other: "KeyedNetwork") -> None:
        """Copy what another network of the same modules found by running, such as dropout calls."""
