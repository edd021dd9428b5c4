"""The division of a table's rows into training, validation, calibration and test; equal rows stay in one part."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vbdl.data.fingerprint import fingerprints
from vbdl.data.splitting import DEFAULT_SHARES, split
from vbdl.tabular import dates
from vbdl.tabular.cells import decoded, is_text, texts, without
from vbdl.tabular.numerals import Recognized, recognize
from vbdl.tabular.reading import ArrowColumn, Reading, compute
from vbdl.tabular.target import decide, fit_target

if TYPE_CHECKING:
    import pyarrow

# if fewer than this share of the rows differ, equal rows are normal for the table and no leak
_MOSTLY_EQUAL = 0.5


@dataclass(frozen=True)
class Parts:
    """The row numbers of each part, how they were divided, and notes for the user."""

    rows: dict[str, Tensor]
    how: str
    notes: list[str] = field(default_factory=list)
    overlap_is_meant: bool = False  # whether equal rows may be in different parts
    groups: Tensor | None = None  # (all rows,) group numbers of a split by group; a group is in one part
    when: Tensor | None = None  # (all rows,) order of the rows of a split by time

    def of_encoded(self, x: Tensor) -> "Parts":
        """These parts for encoded rows (all rows, features), of which more may be equal than of the table's.

        A column that is left out, like a text that differs in every row, no longer tells rows apart.
        """
        different, n = len(fingerprints(x).unique()), len(x)
        if self.overlap_is_meant or different >= n * _MOSTLY_EQUAL:
            return self
        note = f"only {different} of {n} rows differ in the columns that are used: equal rows may be in different parts"
        return replace(self, notes=[*self.notes, note], overlap_is_meant=True)


def divide_table(
    table: "pyarrow.Table",
    target: str,
    task: str | None,
    ignore: Sequence[str],
    shares: Mapping[str, float],
    group: str | None,
    time: str | None,
    seed: int,
    reading: Reading,
) -> Parts:
    """Divide the rows into parts by their unencoded inputs, before any statistic is computed."""
    inputs = [name for name in table.column_names if name != target and name not in ignore]
    classes = None
    if decide(table.column(target), target, task, reading)[0] == "classification":
        every = torch.arange(table.num_rows).numpy()
        numbers, known = fit_target(table.column(target), target, every, task, reading).encode(table.column(target))
        classes = numbers if bool(known.all()) else None
    return divide(table, inputs, classes, shares, group, time, seed, reading)


def divide(
    table: "pyarrow.Table",
    inputs: list[str],
    classes: Tensor | None,
    shares: Mapping[str, float] | None = None,
    group: str | None = None,
    time: str | None = None,
    seed: int = 0,
    reading: Reading | None = None,
) -> Parts:
    """Divide the rows of a table into parts.

    inputs: columns that make rows equal. classes: (rows,) classes, for the same class shares in every part.
    group: a column whose values each go to one part. time: a column by which the parts follow each other.
    reading: how text writes dates and numbers.

    Rows with equal inputs go to one part, so that no test row was trained on; they are joined with the groups of
    `group`. A split by time does not move equal rows: the future may repeat the past.
    """
    n = table.num_rows
    shares = dict(DEFAULT_SHARES if shares is None else shares)
    if group is not None and time is not None:
        raise ValueError("give a group column or a time column: the two can contradict each other")
    if time is not None:
        when, read = moments(table, time, reading)
        rows = split(n, shares, time=when)
        spans = "; ".join(f"{name} {_span(table, time, when, part)}" for name, part in rows.items())
        return Parts(rows, f"by time ({time}{read}): {spans}", [], True, when=when)
    row = _equal(table, inputs)
    different = int(row.max()) + 1 if n else 0
    notes, meant = [], False
    if different < n * _MOSTLY_EQUAL:
        notes.append(f"only {different} of {n} rows differ in their inputs: equal rows may be in different parts")
        row, meant = torch.arange(n), True
    elif different < n:
        notes.append(f"{n - different} rows repeat the inputs of others and stay in one part with them")
    if group is not None:
        groups = codes(table, group)
        together = groups if meant else joined(groups, row)
        return Parts(split(n, shares, groups=together, seed=seed), f"by group ({group})", notes, meant, together)
    if different == n or meant:
        return Parts(split(n, shares, stratify=classes, seed=seed), _how(classes), notes, meant)
    # one row represents its equal rows
    first = torch.zeros(int(row.max()) + 1, dtype=torch.int64)
    first[row.flip(0)] = torch.arange(n).flip(0)
    dealt = split(len(first), shares, stratify=None if classes is None else classes[first], seed=seed)
    part_of = torch.empty(len(first), dtype=torch.int64)
    for number, chosen in enumerate(dealt.values()):
        part_of[chosen] = number
    return Parts(
        {name: (part_of[row] == number).nonzero().flatten() for number, name in enumerate(dealt)}, _how(classes), notes
    )


def _span(table: "pyarrow.Table", time: str, when: Tensor, rows: Tensor) -> str:
    """The first and the last time of some rows, as the table writes them."""
    ends = (int(rows[when[rows].argmin()]), int(rows[when[rows].argmax()]))
    first, last = (str(table.column(time)[row].as_py()) for row in ends)
    return f"{first} to {last}"


def _how(classes: Tensor | None) -> str:
    return "at random" if classes is None else "at random, each class in the same share"


def codes(table: "pyarrow.Table", name: str) -> Tensor:
    """Return (rows,) int64 numbers, equal for equal cells of a column. Raises ValueError if the column is missing."""
    import pyarrow as pa

    column = _column(table, name)
    try:
        numbers = column.dictionary_encode(null_encoding="encode").indices
    except pa.ArrowNotImplementedError:  # lists, structs and extension types
        column = pa.array([None if v is None else repr(v) for v in column.to_pylist()], pa.string())
        numbers = column.dictionary_encode(null_encoding="encode").indices
    return torch.from_numpy(numbers.to_numpy(zero_copy_only=False).astype(np.int64))


def _column(table: "pyarrow.Table", name: str) -> ArrowColumn:
    try:
        return decoded(table.column(name))
    except KeyError:
        raise ValueError(f"there is no column {name!r}; there are {table.column_names}") from None


def moments(table: "pyarrow.Table", name: str, reading: Reading | None = None) -> tuple[Tensor, str]:
    """Return (rows,) int64 ranks of a column's cells in time, equal for equal cells, and how text was read, in words.

    Dates, instants, durations and numbers have their usual order; text has that of the dates or numbers in it. Raises
    ValueError for missing cells, for text that is neither, and for dates with two readings.
    """
    import pyarrow as pa

    pc = compute()

    reading = reading or Reading()
    column, how = _column(table, name), ""
    kind = column.type
    if is_text(kind):
        column = without(column, reading.missing)
    missing = int(pc.sum(pc.is_null(column, nan_is_null=True)).as_py() or 0)
    if missing:
        raise ValueError(f"column {name!r} has {missing} missing cells: no place in time")
    if is_text(kind) or (reading.date_format is not None and pa.types.is_integer(kind)):
        words = texts(column)
        if not is_text(kind):  # as a number, 03022023 has lost its leading zero
            words = pc.utf8_lpad(words, _width(reading.date_format or ""), "0")
        values, how = _sortable(words, name, reading)
        column = pa.array(values)
    elif pa.types.is_integer(kind) and (order := _order_of_digits(column)):
        raise ValueError(
            f"column {name!r} holds whole numbers like {column[0].as_py()} that are dates with the year last, in no "
            f"order as numbers: say how they are written, --date-format {order}"
        )
    elif pa.types.is_duration(kind):
        column = column.cast(pa.int64())
    elif pa.types.is_boolean(kind) or pa.types.is_nested(kind) or pa.types.is_binary(kind):
        raise ValueError(f"column {name!r} holds {kind}, which is no time: dates, instants or numbers are")
    try:
        ranks = pc.rank(column, sort_keys="ascending", tiebreaker="min")
    except pa.ArrowNotImplementedError as error:
        raise ValueError(f"column {name!r} holds {kind}, which has no order in time") from error
    return torch.from_numpy(ranks.to_numpy(zero_copy_only=False).astype(np.int64)), how


def _width(order: str) -> int:
    """Return the number of characters of a date in this format, or 0 if the order is no format."""
    return len(datetime.datetime(2000, 11, 22, 10, 10, 10).strftime(order)) if "%" in order else 0


def _order_of_digits(column: ArrowColumn) -> str | None:
    """Return the format of whole numbers that are dates with the year last, like 03022023, or None.

    None too if all of them are also dates with the year first.
    """
    values = column.to_numpy(zero_copy_only=False).astype(np.int64)
    first, second, year = values // 1_000_000, values // 10_000 % 100, values % 10_000

    def dates_of(days: np.ndarray, months: np.ndarray, years: np.ndarray) -> bool:
        return bool(
            ((days >= 1) & (days <= 31) & (months >= 1) & (months <= 12) & (years >= 1900) & (years <= 2100)).all()
        )

    if len(values) == 0 or dates_of(values % 100, values // 100 % 100, values // 10_000):
        return None
    return "%d%m%Y" if dates_of(first, second, year) else "%m%d%Y" if dates_of(second, first, year) else None


def _sortable(words: "pyarrow.Array", name: str, reading: Reading) -> tuple[np.ndarray, str]:
    """Return (rows,) sortable values of text with dates, times of day or numbers, and how it was read, in words."""
    coded = words.dictionary_encode()
    different = coded.dictionary.to_pylist()
    order, how = reading.date_format, ""
    numbers = recognize(dict.fromkeys(different, 1), name, reading.decimal, reading.thousands)
    if order is None and isinstance(numbers, Recognized) and not numbers.missing:
        values = [numbers.written.number(w) for w in different]
        return np.array(values, np.float64)[coded.indices.to_numpy(zero_copy_only=False)], ", as numbers"
    try:
        if order is None:
            order = dates.order_of(different, name)
            how = f", {order.replace('-', ' ')}" if order else ""
        instants = [dates.micros(dates.instant(w, order)) for w in different]
    except dates.NoDate as error:
        raise ValueError(
            f"column {name!r} holds text, and {error}: say how its dates are written with --date-format, %d.%m.%Y for "
            f"instance, or day-first or month-first"
        ) from error
    return np.array(instants, np.int64)[coded.indices.to_numpy(zero_copy_only=False)], how


def _equal(table: "pyarrow.Table", inputs: list[str]) -> Tensor:
    """Return (rows,) numbers, equal for rows that are equal in these columns."""
    if not inputs or table.num_rows == 0:
        return torch.zeros(table.num_rows, dtype=torch.int64)
    cells = torch.stack([codes(table, name) for name in inputs], dim=1)
    return fingerprints(cells).unique(return_inverse=True)[1]


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Return (rows,) group numbers of the smallest groups that contain whole groups of both."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n, offset = len(a), int(a.max()) + 1
    ones = np.ones(n, dtype=np.int8)
    size = offset + int(b.max()) + 1
    edges = coo_array((ones, (a.numpy(), (b + offset).numpy())), shape=(size, size))
    _, label = connected_components(edges, directed=False)
    return torch.from_numpy(label.astype(np.int64))[a]
