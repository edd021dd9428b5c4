"""Networks that draw from a key: the wrappers of MC dropout and mean-field inference around a user's network."""

from collections.abc import Hashable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from vbdl.nn.frozen import hold_frozen


class KeyedNetwork(nn.Module):
    """A network whose forward is a pure function of its inputs, its parameters and its `key`: a method's own part.

    A subclass of your own defines `forward(*args, **kwargs)`, which draws from `self.key` with functions of
    `vbdl_kernels` and calls `self.inner`, and, if its loss has a KL, `regularization`. Its own parameters and buffers
    are trained, stacked for ensembles and saved. If it has `reset_parameters()`, each member of an ensemble starts from
    what that sets. Inside a forward, parameters are replaced by plain tensors, those of one draw: read them as
    attributes (`self.inner.get_submodule("0").weight`), because torch's `get_parameter` refuses a plain tensor.

    inner: the user's network.
    key: (2,) int64 buffer, (seed, draw), from which everything random is drawn.
    kl_weight: () buffer, the weight of the KL in the loss, if there is one: `fit(kl_warmup=...)` sets it.
    rate: overrides the dropout rates of `inner`, all of them or by module name.
    keeps_apart: whether running it has shown already that the output of a row does not depend on other rows.
    reads_values: whether running it has shown that it reads numbers that differ between draws, as an `if` does.
    row_bytes: the bytes of the largest value that the forward computes for a row; 0 if they are unknown.
    kept: values that follow from the key alone, such as masks and drawn weights, by a name: the forward adds what it
        makes and reads what is there. None: the forward makes them anew.
    steps: (number of the first step, number of steps) if the inputs are a part of longer sequences.
    """

    keeps_on_purpose = ("kept",)  # attributes with values that a forward leaves for the next one, which it may use
    draws_weights: bool = False  # whether the key draws weights, so that a graph may draw the outputs of layers instead
    numbers_places: bool = True  # whether rows at other places in a batch may have other noise in the same draw
    row_by_row: bool = False  # whether the forward runs one row after the other
    together: bool | None = False  # whether rows then run together all the same; None: if that computes the same
    keeps_apart: bool = False
    reads_values: bool = False
    row_bytes: int = 0
    only_calls_inner: bool = False  # whether the forward calls `inner` and does nothing else
    inner: nn.Module
    key: Tensor
    rate: float | Mapping[str, float] | None = None
    kept: dict[Hashable, Tensor] | None = None
    steps: tuple[int, int] | None = None

    def __init__(self, inner: nn.Module | None = None, *, kl: bool = False):
        """inner: the user's network, to hold with a key. kl: whether the loss has a KL, which gives a `kl_weight`."""
        super().__init__()
        if inner is None:  # the subclass registers them
            return
        self.inner = inner
        device = next((t.device for t in (*inner.parameters(), *inner.buffers())), None)
        self.register_buffer("key", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        if kl:
            self.register_buffer("kl_weight", torch.ones((), device=device))

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
        """The regularization that the loss of a row adds, (), in nats, or None: the KL term, for instance.

        That is self.kl_weight * KL / number of training rows. key: (2,) that of the draw, for a KL that is estimated at
        the drawn weights.
        """
        return None

    def adopt(self, other: "KeyedNetwork") -> None:
        """Copy what another network of the same modules found by running, such as dropout calls."""
