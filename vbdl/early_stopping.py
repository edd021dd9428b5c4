"""Early stopping, each member by its own validation likelihood: the state of its best epoch is what it keeps."""

import math

import torch
from torch import Tensor

from vbdl.types import State


class BestEpochs:
    """The best state so far of every member.

    by_member: names of entries with a leading members axis; the others belong to all and follow the latest best.
    """

    def __init__(self, members: int, patience: int | None, by_member: frozenset[str]):
        self.patience, self.by_member = patience, by_member
        self.best = torch.full((members,), math.inf)  # nats a row
        self.epoch = torch.full((members,), -1)
        self.waited = torch.zeros(members, dtype=torch.int64)  # epochs without a better one
        self.active = torch.ones(members, dtype=torch.bool)
        self.kept: State = {}

    def update(self, epoch: int, nll: Tensor, state: State) -> None:
        """Keep the state of members that became better; stop those that have not for long enough. nll: (members,)"""
        better = self.active & (nll < self.best)
        self.best = torch.where(better, nll, self.best)
        self.epoch = torch.where(better, epoch, self.epoch)
        self.waited = torch.where(better, 0, self.waited + 1)
        for name, t in state.items():
            if name not in self.kept:
                self.kept[name] = t.detach().clone()
            elif name in self.by_member:
                chosen = better.to(t.device)
                self.kept[name][chosen] = t.detach()[chosen]
            elif bool(better.any()):
                self.kept[name].copy_(t.detach())
        if self.patience is not None:
            self.active &= self.waited < self.patience

    def last(self, epochs: int) -> int:
        """How many epochs there will be, at most `epochs`, if no member becomes better any more: what is known now of
        when training stops. Asked after `update`."""
        if self.patience is None:
            return epochs
        now = int((self.epoch + self.waited).max()) + 1
        left = (self.patience - self.waited)[self.active]
        return min(epochs, now + (int(left.max()) if len(left) else 0))

    @property
    def done(self) -> bool:
        """Whether every member has stopped."""
        return not bool(self.active.any())

    def restore(self, state: State) -> None:
        """Bring the state back to what was kept, if anything was."""
        with torch.no_grad():
            for name, kept in self.kept.items():
                state[name].copy_(kept)

    def tensors(self) -> State:
        """All of it, for a checkpoint."""
        own = {"best": self.best, "epoch": self.epoch, "waited": self.waited, "active": self.active}
        return own | {f"kept.{name}": t for name, t in self.kept.items()}

    def load(self, found: State, device: torch.device) -> None:
        """What `tensors` gave."""
        self.best, self.epoch = found["best"], found["epoch"]
        self.waited, self.active = found["waited"], found["active"]
        self.kept = {n.removeprefix("kept."): t.to(device) for n, t in found.items() if n.startswith("kept.")}
