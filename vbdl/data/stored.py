"""Training rows that can be taken by number: tensors on the device, or rows in files that are read batch by batch."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vbdl.data.rows import MemberRows, blocks, rows_of, take
from vbdl.types import Inputs

Check = Callable[[Inputs, Tensor], tuple[Inputs, Tensor]]


class StoredRows:
    """Rows that can be taken by number.

    numbers: those of the rows in x and y; all rows by default. check: called with rows that are taken from a file;
        returns them checked and as they are trained on. None: x and y are so already.
    """

    def __init__(self, x: Inputs, y: Tensor, numbers: Tensor | None = None, check: Check | None = None):
        self.x, self.y, self._numbers, self._check = x, y, numbers, check

    @property
    def read_when_taken(self) -> bool:
        """Whether rows are read, checked and converted when they are taken."""
        return self._check is not None

    def part(self, numbers: Tensor) -> "StoredRows":
        """The rows with these numbers alone; those of rows on the device are copied."""
        if self._check is None:
            return StoredRows(*self.take(numbers))
        return StoredRows(self.x, self.y, numbers if self._numbers is None else self._numbers[numbers], self._check)

    def __len__(self) -> int:
        return len(self.y) if self._numbers is None else len(self._numbers)

    def take(self, rows: Tensor) -> tuple[Inputs, Tensor]:
        """The inputs and targets of these rows; rows: (...) int64, which replace the first axis."""
        numbers = rows if self._numbers is None else self._numbers[rows]
        if self._check is None:
            return take(self.x, numbers.to(self.y.device)), rows_of(self.y, numbers)
        # in their order in the file, and once if several members see them in one step
        each, places = numbers.unique(return_inverse=True)
        x, y = self._check(take(self.x, each), rows_of(self.y, each))
        if places.ndim == 1 and len(each) == len(places) and bool((places.diff() > 0).all()):
            return x, y
        places = places.to(y.device)
        return take(x, places), rows_of(y, places)

    def all(self) -> tuple[Inputs, Tensor]:
        """The inputs and targets of all rows, in memory."""
        return self.take(torch.arange(len(self)))

    def blocks(self) -> Iterator[tuple[range, Inputs, Tensor]]:
        """Pass over all rows: their numbers here, and their inputs and targets, a block at a time."""
        for numbers in blocks(self.x, len(self)):
            yield numbers, *self.take(torch.arange(numbers.start, numbers.stop))


class StoredMemberRows(MemberRows):
    """Batches of stored rows, in the order of `MemberRows`; of rows in files only those of a batch are read."""

    def __init__(self, stored: StoredRows, rows: Tensor, batch_size: int, seeds: list[int], own: bool):
        super().__init__(stored.x, stored.y, rows, batch_size, seeds, own)
        self._stored, self.read_when_taken = stored, stored.read_when_taken

    def _batch(self, picked: Tensor) -> tuple[Inputs, Tensor]:
        return self._stored.take(picked) if self.read_when_taken else super()._batch(picked)


def in_file(data: object) -> bool:
    """Whether an array or a tensor in the data lies in a memory-mapped file, so that it is not to be read whole."""
    arrays = [leaf for leaf in tree_leaves(data) if isinstance(leaf, np.ndarray | Tensor)]
    return any(isinstance(leaf, np.memmap) for leaf in arrays) or _any_mapped(
        [leaf for leaf in arrays if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.numel()]
    )


def _any_mapped(tensors: list[Tensor]) -> bool:
    """Whether a tensor's memory is a file's, as after torch.load(mmap=True) or torch.from_file(shared=True)."""
    if not tensors:
        return False
    if any(t.untyped_storage().filename is not None for t in tensors):
        return True
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    places = [t.data_ptr() for t in tensors]
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/") or fields[5].startswith(("/dev/", "/memfd:")):
            continue  # memory without a file, or shared memory
        start, end = (int(address, 16) for address in fields[0].split("-"))
        if any(start <= place < end for place in places):
            return True
    return False
