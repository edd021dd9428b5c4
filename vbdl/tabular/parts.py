"""Which rows of a table train, stop the training, calibrate and test: rows that are equal never come apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vbdl.fingerprint import fingerprints
from vbdl.splitting import DEFAULT_SHARES, split
from vbdl.tabular.columns import combined, texts
from vbdl.tabular.reading import compute

# below this share of different rows, equal rows are what the table is made of, and are no leak
_MOSTLY_EQUAL = 0.5


@dataclass(frozen=True)
class Parts:
    """Row numbers of each part, and what was noticed on the way."""

    rows: dict[str, Tensor]
    how: str
    notes: list[str] = field(default_factory=list)
    overlap_is_meant: bool = False  # equal rows are in different parts, and that is no accident
    groups: Tensor | None = None  # (all rows,) of a split by group: rows of one number are in one part
    when: Tensor | None = None  # (all rows,) of a split by time: the order of the rows


def divide(
    table: Any,
    inputs: list[str],
    classes: Tensor | None,
    shares: Mapping[str, float] | None = None,
    group: str | None = None,
    time: str | None = None,
    seed: int = 0,
) -> Parts:
    """Parts of the rows of a table.

    inputs: columns by which rows are equal. classes: (rows,) to give every part each class in its share.
    group: a column; no value of it is in two parts. time: a column; the parts follow each other in it.

    Rows whose inputs are equal go to one part together, so that nothing tested was trained on: a group of their own, or
    joined with the groups of `group`. In a split by time they stay where they were: the future may repeat the past.
    """
    n = table.num_rows
    shares = dict(DEFAULT_SHARES if shares is None else shares)
    if group is not None and time is not None:
        raise ValueError("give a group column or a time column: the two can contradict each other")
    if time is not None:
        when = codes(table, time, ordered=True)
        how = f"by time ({time}), the earliest rows to train"
        return Parts(split(n, shares, time=when), how, [], True, when=when)
    row = _equal(table, inputs)
    different = int(row.max()) + 1 if n else 0
    notes, meant = [], False
    if different < n * _MOSTLY_EQUAL:
        notes.append(f"only {different} of {n} rows differ in their inputs: equal rows may be in different parts")
        row, meant = torch.arange(n), True
    elif different < n:
        notes.append(f"{n - different} rows repeat the inputs of others and stay in one part with them")
    if group is not None:
        found = codes(table, group)
        together = found if meant else joined(found, row)
        return Parts(split(n, shares, groups=together, seed=seed), f"by group ({group})", notes, meant, together)
    if different == n or meant:
        return Parts(split(n, shares, stratify=classes, seed=seed), _how(classes), notes, meant)
    # one row speaks for its equals
    first = torch.zeros(int(row.max()) + 1, dtype=torch.int64)
    first[row.flip(0)] = torch.arange(n).flip(0)
    dealt = split(len(first), shares, stratify=None if classes is None else classes[first], seed=seed)
    part_of = torch.empty(len(first), dtype=torch.int64)
    for number, chosen in enumerate(dealt.values()):
        part_of[chosen] = number
    return Parts(
        {name: (part_of[row] == number).nonzero().flatten() for number, name in enumerate(dealt)}, _how(classes), notes
    )


def _how(classes: Tensor | None) -> str:
    return "at random" if classes is None else "at random, each class in the same share"


def codes(table: Any, name: str, ordered: bool = False) -> Tensor:
    """(rows,) int64, equal for equal cells of a column; in their order with `ordered`. ValueError for missing cells
    of an ordered column, or where there is no such column."""
    import pyarrow as pa

    pc = compute()

    if name not in table.column_names:
        raise ValueError(f"there is no column {name!r}; there are {table.column_names}")
    column = combined(table.column(name))
    if ordered:
        if column.null_count:
            raise ValueError(f"column {name!r} has {column.null_count} missing cells: no place in time")
        ranks = pc.rank(column, sort_keys="ascending", tiebreaker="min")
        return torch.from_numpy(ranks.to_numpy(zero_copy_only=False).astype(np.int64))
    if pa.types.is_nested(column.type) or pa.types.is_dictionary(column.type):
        column = texts(column) if pa.types.is_dictionary(column.type) else pa.array(map(repr, column.to_pylist()))
    found = column.dictionary_encode(null_encoding="encode").indices
    return torch.from_numpy(found.to_numpy(zero_copy_only=False).astype(np.int64))


def _equal(table: Any, inputs: list[str]) -> Tensor:
    """(rows,) a number for each different row of these columns."""
    if not inputs or table.num_rows == 0:
        return torch.zeros(table.num_rows, dtype=torch.int64)
    cells = torch.stack([codes(table, name) for name in inputs], dim=1)
    return fingerprints(cells).unique(return_inverse=True)[1]


def joined(a: Tensor, b: Tensor) -> Tensor:
    """(rows,) groups that hold whole groups of both."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, offset = len(a), int(a.max()) + 1
    ones = np.ones(n, dtype=np.int8)
    size = offset + int(b.max()) + 1
    edges = coo_array((ones, (a.numpy(), (b + offset).numpy())), shape=(size, size))
    _, label = connected_components(edges, directed=False)
    return torch.from_numpy(label.astype(np.int64))[a]
