"""Snapshot ensembles: the weights at the ends of the cycles of a cyclical learning rate, from one training.

Huang, Li, Pleiss, Liu, Hopcroft and Weinberger, Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017,
https://arxiv.org/abs/1704.00109
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vbdl.calling.adapters import how_to_unfreeze
from vbdl.calling.copies import copied
from vbdl.calling.stacking import without_dots
from vbdl.calling.traversing import state_of
from vbdl.nn.frozen import frozen_names, hold_frozen
from vbdl.nn.objective import PosteriorOfOneNetwork, take_network
from vbdl.types import Course, Inputs, Likelihood, Output, State


class Snapshots(PosteriorOfOneNetwork):
    """A snapshot ensemble: q(w) is an equal mixture of the weights at the end of each cycle of one training.

        q = vbdl.Snapshots(network, n_members=5)
        vbdl.fit(q, data, likelihood, epochs=100, lr=1e-3)  # five cycles of 20 epochs

    `fit` divides its epochs into n_members cycles. In each, the learning rate falls from `lr` to 0 along half a cosine,
    step by step, then starts again: lr / 2 * (1 + cos(pi * t)), t the share of the cycle that is done. If the epochs
    do not divide, cycles differ by one epoch. A further `fit` replaces the snapshots, starting at the last.

    The likelihood is shared: all snapshots have its parameters, like a noise level, at the end of training. No epoch is
    the best one: `fit` refuses `patience`, and records validation without stopping.

    module: any network, trained or not; it is copied. Frozen parameters are held once.
    n_members: the number of cycles and snapshots.
    schedule: function of the share t of a cycle that is done, in [0, 1), that returns the learning rate as a fraction
        of `lr`, instead of the cosine. It is not saved with the posterior.
    seed: of dropout masks in training.
    output: name or index of the module's output to predict from, or a function that returns it, if it returns several;
        "logits" are found without it.

    Raises ValueError if it is used before `fit` has taken all snapshots, or for fewer epochs than cycles.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> q, likelihood = vbdl.Snapshots(net, n_members=3), vbdl.Categorical()
    >>> history = vbdl.fit(q, (x, y), likelihood, epochs=3, compile=False)
    >>> vbdl.Predictor(q, likelihood, compile=False)(x).n_samples
    3
    """

    taken: Tensor

    def __init__(
        self,
        module: nn.Module,
        n_members: int = 5,
        seed: int = 0,
        *,
        schedule: Callable[[float], float] | None = None,
        output: Output = None,
    ):
        super().__init__()
        module = take_network(self, module, output)
        if n_members < 1:
            raise ValueError(f"n_members must be the number of snapshots, at least 1, got {n_members}")
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"schedule must be a function of the share of a cycle that is done, e.g. lambda t: 1 - t; got "
                f"{schedule!r}"
            )
        self.module = copied(module)
        self.n_draws, self.seed = n_members, seed
        self._rate = schedule or half_cosine
        self._ends: tuple[int, ...] = ()  # the numbers of the last epoch of each cycle
        self._in_training = False
        state, frozen = state_of(self.module), frozen_names(self.module)
        self._names = tuple(n for n in state if n not in frozen)
        if not self._names:
            unfreeze = f"unfreeze some{how_to_unfreeze(module)}"
            raise ValueError(f"every parameter of the network is frozen, so snapshots cannot differ: {unfreeze}")
        self.snapshots = nn.Module()
        for name in self._names:
            self.snapshots.register_buffer(
                without_dots(name), state[name].detach().expand(n_members, *state[name].shape).clone()
            )
        device = state[self._names[0]].device
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def config(self) -> dict[str, Any]:
        """The arguments that make it again, given its network; `schedule`, a function, is not among them."""
        arguments: dict[str, Any] = {"n_members": self.n_draws, "seed": self.seed}
        return arguments if self.output is None else arguments | {"output": self.output}

    def train(self, mode: bool = True) -> "Snapshots":
        super().train(mode)
        if mode:
            hold_frozen(self.module)
        return self

    # -- prediction

    def draws(self, numbers: Tensor, seed: int) -> State:
        """The weights of these snapshots, (samples, ...) each; in training those of the network in training."""
        if self._in_training:
            state = state_of(self.module)
            return {n: state[n].detach().expand(len(numbers), *state[n].shape).clone() for n in self._names}
        stacks = {n: self.snapshots.get_buffer(without_dots(n)) for n in self._names}
        return {name: t.index_select(0, numbers.to(t.device)) for name, t in stacks.items()}

    def check_ready(self) -> None:
        """Raise ValueError if not all snapshots are taken."""
        if int(self.taken) < (self.n_draws or 0):
            raise ValueError(
                f"{int(self.taken)} of {self.n_draws} snapshots are taken: train with vbdl.fit(q, data, likelihood, "
                f"epochs=...), which takes one at the end of each cycle"
            )

    # -- training

    def course(self, epochs: int, lr: float) -> Course:
        count = self.n_draws or 1
        if epochs < count:
            raise ValueError(
                f"{count} snapshots need at least {count} epochs, one for each cycle, got epochs={epochs}: give more, "
                f"or a smaller n_members"
            )
        starts = [round(epochs * cycle / count) for cycle in range(count + 1)]
        self._ends = tuple(start - 1 for start in starts[1:])

        def rate(done: float) -> float:
            cycle = max(c for c in range(count) if starts[c] <= done)
            return self._rate((done - starts[cycle]) / (starts[cycle + 1] - starts[cycle]))

        return Course(rate, collects_from=0)

    def being_trained(self, on: bool) -> None:
        self._in_training = on

    def before_training(self, x: Inputs, y: Tensor, likelihood: Likelihood, own_rows: bool = False) -> None:
        if int(self.taken) == self.n_draws:  # of an earlier training; fewer are those of the checkpoint it resumes from
            self.taken.zero_()

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        """Take a snapshot if a cycle ends with this epoch."""
        if epoch not in self._ends:
            return
        state = state_of(self.module)
        for name in self._names:
            self.snapshots.get_buffer(without_dots(name))[self._ends.index(epoch)] = state[name].detach()
        self.taken.fill_(self._ends.index(epoch) + 1)


def half_cosine(t: float) -> float:
    """Return the fraction (1 + cos(pi t)) / 2 of the learning rate: 1 at the start of a cycle, 0 at its end."""
    return (1 + math.cos(math.pi * t)) / 2
