"""Splits of a data set into disjoint parts: by row, by class, by group or by time."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

DEFAULT_SHARES = {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1}


def split(
    n: int,
    shares: Mapping[str, float] | None = None,
    *,
    stratify: Tensor | Sequence | np.ndarray | None = None,
    groups: Tensor | Sequence | np.ndarray | None = None,
    time: Tensor | Sequence | np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Split n rows into named parts.

    Args:
        n: number of rows in the data set.
        shares: the share of the rows by name of the part, positive, summing to one; by default 70 % train and 10 % each
            of validation, calibration and test.
        stratify: (n,) class of each row; every part gets the same share of each class, up to whole rows.
        groups: (n,) patient, track or customer of each row; no group is in two parts. Groups are assigned whole,
            largest first, each to the part that is furthest below its share of the rows.
        time: (n,) time of each row, numbers or dates; the parts follow each other in time, in the order of `shares`,
            and rows of equal time are in one part, so that no part holds a row later than the next part's.
        seed: of the random choices; a split by time has none.

    Returns: the row numbers of each part, int64, ascending, by name in the order of `shares`; every row is in exactly
    one part. Only one of stratify, groups and time can be given.
    Raises ValueError if a part would be empty.

    >>> parts = vbdl.split(10, {"train": 0.6, "test": 0.4}, stratify=[0] * 5 + [1] * 5)
    >>> {name: len(rows) for name, rows in parts.items()}
    {'train': 6, 'test': 4}
    """
    if not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be a whole number of rows, at least 1, not {n}")
    shares = dict(DEFAULT_SHARES if shares is None else shares)
    if not shares or any(not (math.isfinite(s) and s > 0) for s in shares.values()):
        raise ValueError(f"shares must be positive, got {shares}")
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares must sum to one, got a sum of {sum(shares.values()):.6g}")
    if sum(choice is not None for choice in (stratify, groups, time)) > 1:
        raise ValueError("give one of stratify, groups and time: two of them can contradict each other")
    generator = torch.Generator().manual_seed(seed)
    wanted = list(shares.values())
    if time is not None:
        part = _by_time(_column(time, n, "time"), wanted)
    elif groups is not None:
        part = _by_group(_codes(groups, n, "groups"), wanted, generator)
    elif stratify is not None:
        part = _stratified(_codes(stratify, n, "stratify"), wanted, generator)
    else:
        part = torch.empty(n, dtype=torch.int64)
        part[torch.randperm(n, generator=generator)] = _consecutive(n, wanted)
    rows_of = {name: (part == i).nonzero().squeeze(1) for i, name in enumerate(shares)}
    empty = [name for name, rows in rows_of.items() if rows.numel() == 0]
    if empty:
        raise ValueError(
            f"part {empty[0]!r} would have no row: {n} rows (or their groups, or times) are too few for the shares "
            f"{shares}; give larger shares or more rows"
        )
    return rows_of


def _column(values: Tensor | Sequence | np.ndarray, n: int, name: str) -> Tensor:
    """The values as a tensor (n,); dates become int64 nanoseconds. name: the argument, for errors."""
    if not isinstance(values, Tensor):
        values = np.asarray(values)
        if name == "time" and values.dtype.kind in "MO":  # dates, of numpy, pandas or Python
            dates = values.astype("datetime64[ns]")
            if bool(np.isnat(dates).any()):
                raise ValueError(f"{name} has no date in row {int(np.isnat(dates).argmax())}")
            values = dates.astype(np.int64)
    column = torch.as_tensor(values).detach().cpu()
    if column.shape != (n,):
        raise ValueError(f"{name} must be ({n},), one value per row, not {tuple(column.shape)}")
    if column.is_floating_point() and bool(column.isnan().any()):
        raise ValueError(f"{name} has a NaN in row {int(column.isnan().nonzero()[0])}")
    return column


def _codes(values: Tensor | Sequence | np.ndarray, n: int, name: str) -> Tensor:
    """The code of each row's value, (n,): distinct values, which may be strings, are numbered 0, 1, ..."""
    if not isinstance(values, Tensor):
        values = list(values)
        if any(isinstance(v, str) for v in values):
            number: dict = {}
            values = [number.setdefault(v, len(number)) for v in values]
    return _column(values, n, name).unique(return_inverse=True)[1]


def _consecutive(n: int, shares: list[float]) -> Tensor:
    """The part number of each of n consecutive positions, cut at the rounded cumulative shares, (n,)."""
    ends = [round(n * sum(shares[: i + 1])) for i in range(len(shares))]
    return torch.bucketize(torch.arange(n), torch.tensor(ends[:-1], dtype=torch.int64), right=True)


def _by_time(time: Tensor, shares: list[float]) -> Tensor:
    order = time.argsort(stable=True)
    part = torch.empty_like(order)
    part[order] = _consecutive(time.numel(), shares)
    # rows of equal time that a cut would divide all go to the earlier part
    _, instant = time.unique(return_inverse=True)
    earliest = torch.full((int(instant.max()) + 1,), len(shares), dtype=torch.int64)
    return earliest.scatter_reduce(0, instant, part, "amin")[instant]


def _by_group(groups: Tensor, shares: list[float], generator: torch.Generator) -> Tensor:
    sizes = torch.bincount(groups)
    # shuffle first, so that the stable sort by size keeps groups of equal size in random order
    shuffled = torch.randperm(sizes.numel(), generator=generator)
    order = shuffled[sizes[shuffled].argsort(descending=True, stable=True)]
    missing = [share * groups.numel() for share in shares]
    of_group = torch.empty_like(sizes)
    for group in order.tolist():
        # greedy: the part that lacks the largest fraction of its rows
        best = max(range(len(shares)), key=lambda i: (missing[i] / shares[i], -i))
        of_group[group] = best
        missing[best] -= int(sizes[group])
    return of_group[groups]


def _stratified(classes: Tensor, shares: list[float], generator: torch.Generator) -> Tensor:
    # sort rows by class, in random order within a class, and assign each to the part furthest below its share: every
    # part gets its share of each class, and of all rows, to within a row
    n = classes.numel()
    shuffled = torch.randperm(n, generator=generator)
    line = shuffled[classes[shuffled].argsort(stable=True)]
    part = torch.empty(n, dtype=torch.int64)
    assigned = [0.0] * len(shares)
    for place, row in enumerate(line.tolist(), start=1):
        best = max(range(len(shares)), key=lambda i: (place * shares[i] - assigned[i], -i))
        part[row] = best
        assigned[best] += 1
    return part
