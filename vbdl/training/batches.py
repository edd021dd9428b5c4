"""The data of one training: the batches of each epoch, the rows it is validated on, and what tells them apart later."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vbdl.data.fingerprint import fingerprints
from vbdl.data.rows import Batches, Rows, bootstrap, check_rows, holdout, take, whole
from vbdl.training.options import TrainingOptions
from vbdl.types import Inputs

Check = Callable[[Inputs, Tensor], tuple[Inputs, Tensor]]


class TrainingData:
    """What `fit` was given, as checked batches.

    check: puts rows on the device, and raises for those that cannot be trained on.
    own_rows: each member has batches of its own, with a leading members axis; never so with a DataLoader.
    validation: (inputs, targets) to validate on, or None.
    fingerprints: of the rows trained on, one tensor for all rows or one a batch of a DataLoader.
    """

    def __init__(self, data: Any, options: TrainingOptions, n_members: int, stacked: bool, check: Check):
        self._check = check
        self._unseen = True  # whether no epoch of a DataLoader was begun yet
        self.fingerprints: list[Tensor] = []
        self.validation: tuple[Inputs, Tensor] | None = None
        if options.validation is not None and not options.holds_out:
            self.validation = check(*whole(options.validation))
        if isinstance(data, DataLoader):
            if options.bootstrap or options.member_rows is not None or options.holds_out:
                raise ValueError(
                    "bootstrap, member_rows and a share for validation pick rows, which a DataLoader does not let us: "
                    "give fit the tensors or the Dataset"
                )
            self._batches: Rows | Batches = Batches(data)
        else:
            self._batches = self._rows(data, options, n_members, stacked)
        self.own_rows = self._batches.own

    def _rows(self, data: Any, options: TrainingOptions, n_members: int, stacked: bool) -> Rows:
        """Each member's rows of a data set that is held whole."""
        x, y = whole(data)
        check_rows(x, y)
        x, y = self._check(x, y)
        rows = torch.arange(len(y))
        if options.holds_out:
            seed = options.seed if options.holdout_seed is None else options.holdout_seed
            rows, held = holdout(len(y), float(options.validation), seed)  # type: ignore[arg-type]
            self.validation = take(x, held), y[held]
        seeds = [options.seed + m for m in range(n_members)]
        if options.member_rows is not None:
            chosen = torch.as_tensor(options.member_rows)
            if chosen.ndim != 2 or chosen.shape[0] != n_members:
                raise ValueError(
                    f"member_rows is (members, n) = ({n_members}, n) row numbers, got {tuple(chosen.shape)}"
                )
        elif options.bootstrap:
            chosen = torch.stack([rows[bootstrap(len(rows), seed)] for seed in seeds])
        else:
            chosen = rows.unsqueeze(0)
        self.fingerprints.append(fingerprints(take(x, chosen.unique())))
        return Rows(x, y, chosen, options.batch_size, seeds if stacked else seeds[:1], stacked)

    def __len__(self) -> int:
        """Batches in an epoch; 1 where a stream does not know."""
        return len(self._batches)

    def epoch(self, number: int) -> Iterator[tuple[Inputs, Tensor]]:
        """The checked batches of this epoch, (inputs, targets); those of a DataLoader are fingerprinted once."""
        if isinstance(self._batches, Rows):
            yield from self._batches.epoch(number)
            return
        unseen, self._unseen = self._unseen, False
        for x, y in self._batches.epoch(number):
            x, y = self._check(x, y)
            if unseen:
                self.fingerprints.append(fingerprints(x))
            yield x, y
