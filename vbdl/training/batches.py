"""The data of one training: the batches of each epoch, the validation rows, and fingerprints of the training rows."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vbdl.data.fingerprint import fingerprints
from vbdl.data.rows import Batches, Data, MemberRows, bootstrap, check_sizes, holdout, whole
from vbdl.data.stored import StoredMemberRows, StoredRows, in_file
from vbdl.progress import Progress
from vbdl.training.options import TrainingOptions
from vbdl.types import Inputs


class Check(Protocol):
    """Moves rows to the device and raises an error for rows that cannot be trained on, like `RowChecks`."""

    def __call__(self, x: Inputs, y: Tensor, converts: bool = False) -> tuple[Inputs, Tensor]: ...

    def check_finite(self, x: Inputs, first: int = 0) -> None: ...

    def too_large(self, x: Inputs) -> bool: ...


class TrainingData:
    """The data of one training as batches, checked and moved to the device.

    check: moves rows to the device and raises an error for rows that cannot be trained on.
    members: the numbers of the members that have batches here, of n_members.
    own_rows: whether each member has its own batches, with a leading members axis; always False with a DataLoader.
    validation: the rows to validate on, or None.
    fingerprints: hashes of the training rows, one tensor for all rows or one per batch of a DataLoader.
    """

    def __init__(
        self, data: Data, options: TrainingOptions, n_members: int, members: range, stacked: bool, check: Check
    ):
        self._check = check
        self._unseen = True  # until the first epoch of a DataLoader has ended
        self.fingerprints: list[Tensor] = []
        self.validation: StoredRows | None = None
        if options.validation is not None and not options.holds_out:
            self.validation = self._stored(options.validation)
            self._look_through(self.validation)
        if isinstance(data, DataLoader):
            if options.bootstrap or options.member_rows is not None or options.holds_out:
                raise ValueError(
                    "bootstrap, member_rows and a share for validation select rows, which a DataLoader does not allow: "
                    "give fit the tensors or the Dataset"
                )
            self._batches: MemberRows | Batches = Batches(data, self._check.check_finite)
        else:
            self._batches = self._rows(data, options, n_members, members, stacked)
        self.own_rows = self._batches.own

    def _stored(self, data: object) -> StoredRows:
        """All rows of a data set, checked and on the device; rows in files are read and checked when they are taken."""
        from_file = in_file(data)
        x, y = whole(data)
        check_sizes(x, y)
        if from_file or self._check.too_large(x):
            return StoredRows(x, y, check=partial(self._check, converts=True))
        self._check.check_finite(x)
        return StoredRows(*self._check(x, y))

    def _look_through(self, stored: StoredRows) -> Tensor:
        """Check all rows, a block at a time if they are in files; returns their fingerprints, (rows,)."""
        if not stored.read_when_taken:
            return fingerprints(stored.x)
        hashes = torch.empty(len(stored), dtype=torch.int64)
        for rows, x, _ in stored.blocks():
            self._check.check_finite(x, rows.start)
            hashes[rows.start : rows.stop] = fingerprints(x)
        return hashes

    def _rows(self, data: Data, options: TrainingOptions, n_members: int, members: range, stacked: bool) -> MemberRows:
        """The batches of a data set, with the rows of each member."""
        stored = self._stored(data)
        n = len(stored)
        rows = torch.arange(n)
        if options.holds_out:
            seed = options.seed if options.holdout_seed is None else options.holdout_seed
            rows, held_out = holdout(n, float(options.validation), seed)  # type: ignore[arg-type]
            self.validation = stored.part(held_out)
        seeds = [options.seed + m for m in range(n_members)]
        if options.member_rows is not None:
            chosen = torch.as_tensor(options.member_rows).long()
            chosen = torch.where(chosen < 0, chosen + n, chosen)  # from the end, as Python counts
            if chosen.ndim != 2 or chosen.shape[0] != n_members:
                raise ValueError(
                    f"member_rows must be row numbers of shape (members, n) = ({n_members}, n), got shape "
                    f"{tuple(chosen.shape)}"
                )
        elif options.bootstrap:
            chosen = torch.stack([rows[bootstrap(len(rows), seed)] for seed in seeds])
        else:
            chosen = rows.unsqueeze(0)
        self.fingerprints.append(self._look_through(stored)[chosen.unique()])
        if len(chosen) > 1:
            chosen = chosen[members.start : members.stop]
        mine = seeds[members.start : members.stop] if stacked else seeds[:1]
        return StoredMemberRows(stored, chosen, options.batch_size, mine, stacked)

    def hashes(self) -> list[Tensor]:
        """Hashes of all training rows and targets, and of the validation rows; empty for a DataLoader."""
        if not isinstance(self._batches, MemberRows):
            return []
        held_out = [] if self.validation is None else [fingerprints(y) for _, _, y in self.validation.blocks()]
        return [*self.fingerprints, fingerprints(self._batches.y), *held_out]

    def __len__(self) -> int:
        """The number of batches in an epoch; 1 for a stream of unknown length."""
        return len(self._batches)

    def steps_with(self, rows: int) -> int:
        """The number of batches of so many rows in an epoch."""
        return self._batches.steps_with(rows)

    def passes(self, title: str, shown: bool | None) -> "Passes":
        """The training rows, to be passed over after training with a progress display of this title."""
        return Passes(self, title, shown)

    def of_members(self, number: int) -> list[Iterator[tuple[Inputs, Tensor]]] | None:
        """The batches of an epoch for each member alone, without a members axis.

        None if members share batches, or if rows are read from a file, once for all members that see them in a step.
        """
        batches = self._batches
        if not isinstance(batches, StoredMemberRows) or not batches.own or batches.read_when_taken:
            return None
        return [batches.epoch_of(index, number) for index in range(len(batches.seeds))]

    def epoch(self, number: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield the checked batches of this epoch, (inputs, targets); a DataLoader's are fingerprinted once."""
        if isinstance(self._batches, MemberRows):
            yield from self._batches.epoch(number)
            return
        for x, y in self._batches.epoch(number):
            x, y = self._check(x, y)
            if self._unseen:
                self.fingerprints.append(fingerprints(x))
            yield x, y
        self._unseen = False


class Passes:
    """The batches of one epoch and the validation rows, which can be passed over several times; progress is shown."""

    def __init__(self, data: TrainingData, title: str, shown: bool | None):
        self._data, self._title, self._shown = data, title, shown
        self.own = data.own_rows

    @property
    def validation(self) -> tuple[Inputs, Tensor] | None:
        """The held-out inputs and targets, or None if there are none."""
        return None if self._data.validation is None else self._data.validation.all()

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        with Progress(self._title, len(self._data), self._shown) as bar:
            for batch in self._data.epoch(0):
                yield batch
                bar.advance()
