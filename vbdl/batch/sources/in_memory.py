"""Tables and data sets in memory as sources of rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vbdl.batch.sources.source import Chunk, JsonValue, Source

if TYPE_CHECKING:
    import pyarrow


class Items(Protocol):
    """A map-style data set of torch, or any other object with a length and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...  # a tensor, or any nesting of tensors, arrays and numbers


@dataclass
class DatasetSource(Source):
    """A map-style data set of inputs, or of (input, target) pairs, whose targets are ignored."""

    dataset: Items
    name: str = "dataset"
    pairs: bool | None = None  # whether an item is (input, target); by default a tuple of two is

    def state(self) -> dict[str, JsonValue]:
        return {"name": self.name, "rows": len(self.dataset)}

    def count(self) -> int | None:
        return len(self.dataset)

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        n = len(self.dataset)
        for number in range(max(1, -(-n // size))):
            if skip(number):
                continue
            start = number * size
            inputs, rows, rejected = [], [], []
            for row in range(start, min(start + size, n)):
                try:
                    item = self.dataset[row]
                except Exception as error:  # a user's data set may raise any error
                    rejected.append((row, f"{type(error).__name__}: {error}"))
                    continue
                pair = isinstance(item, tuple) and len(item) == 2 if self.pairs is None else self.pairs
                inputs.append(item[0] if pair else item)
                rows.append(row)
            none = self.dataset[:0] if isinstance(self.dataset, Tensor) else torch.empty(0)
            data = torch.utils.data.default_collate(inputs) if inputs else none
            yield Chunk(number, np.array(rows, np.int64), data, rejected)


@dataclass
class MemoryTable(Source):
    """A pyarrow.Table in memory."""

    table: "pyarrow.Table"
    name: str = "table"

    def state(self) -> dict[str, JsonValue]:
        return {"name": self.name, "rows": self.table.num_rows, "bytes": self.table.nbytes}

    def count(self) -> int | None:
        return self.table.num_rows

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        for number in range(max(1, -(-self.table.num_rows // size))):
            if not skip(number):
                part = self.table.slice(number * size, size)
                yield Chunk(number, np.arange(number * size, number * size + part.num_rows), part)
