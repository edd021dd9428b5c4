"""Early stopping: each member keeps the state of the epoch at which its own validation likelihood was best."""

import math

import torch
from torch import Tensor

from vbdl.types import State


class BestEpochs:
    """The state of every member at its best epoch so far.

    by_member: names of entries with a leading members axis. All other entries are shared by the members, and are kept
    from the last epoch at which any member improved. Members that train shared entries all have the loss of their
    mixture (`Validation`), so that they improve, stop and go back together.
    held: the numbers of the members in the state that `update` and `restore` take; all of them by default.
    """

    def __init__(self, members: int, patience: int | None, by_member: frozenset[str], held: range | None = None):
        self.patience, self.by_member = patience, by_member
        self._held = slice(None) if held is None else slice(held.start, held.stop)
        self.best = torch.full((members,), math.inf)  # nats per row
        self.epoch = torch.full((members,), -1)
        self.waited = torch.zeros(members, dtype=torch.int64)  # epochs since the last improvement
        self.active = torch.ones(members, dtype=torch.bool)
        self.kept: State = {}

    def update(self, epoch: int, nll: Tensor, state: State) -> None:
        """Keep the state of members whose validation loss fell, and stop members that have waited `patience` epochs.

        nll: (members,) validation losses of this epoch.
        """
        better = self.active & (nll < self.best)
        self.best = torch.where(better, nll, self.best)
        self.epoch = torch.where(better, epoch, self.epoch)
        self.waited = torch.where(better, 0, self.waited + 1)
        for name, t in state.items():
            if name not in self.kept:
                self.kept[name] = t.detach().clone()
            elif name in self.by_member:
                chosen = better[self._held].to(t.device)
                self.kept[name][chosen] = t.detach()[chosen]
            elif bool(better.any()):
                self.kept[name].copy_(t.detach())
        if self.patience is not None:
            self.active &= self.waited < self.patience

    def last(self, epochs: int) -> int:
        """The number of epochs after which training stops if no member improves again, at most `epochs`.

        To be called after `update`.
        """
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
        """Copy the kept entries into this state; do nothing if `update` was never called."""
        with torch.no_grad():
            for name, kept in self.kept.items():
                state[name].copy_(kept)

    def tensors(self) -> State:
        """The tensors that a checkpoint saves and `load` takes."""
        numbers = {"best": self.best, "epoch": self.epoch, "waited": self.waited, "active": self.active}
        return numbers | {f"kept.{name}": t for name, t in self.kept.items()}

    def load(self, saved: State, device: torch.device) -> None:
        """Restore the tensors that `tensors` returned in an earlier run."""
        self.best, self.epoch = saved["best"], saved["epoch"]
        self.waited, self.active = saved["waited"], saved["active"]
        self.kept = {n.removeprefix("kept."): t.to(device) for n, t in saved.items() if n.startswith("kept.")}
