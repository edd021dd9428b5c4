"""A table that is read, divided into parts and encoded as numbers, for training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vbdl.tabular.cells import decoded, is_text
from vbdl.tabular.inference import infer, training_table
from vbdl.tabular.parts import Parts, divide_table
from vbdl.tabular.reading import ArrowColumn, Reading, arrow
from vbdl.tabular.schema import Schema
from vbdl.tabular.target import has_target


@dataclass(frozen=True)
class DividedTable:
    """The rows of a table that have a target, as numbers, and the parts that they are divided into.

    x: (rows, features). y: (rows,) targets. rows: row numbers of each part, without rows that could not be read. keep:
    the numbers of these rows in the table. left_out: the reason for each column that is no input. notes: for the user.
    """

    schema: Schema
    x: Tensor
    y: Tensor
    parts: Parts
    rows: dict[str, Tensor]
    keep: Tensor
    left_out: dict[str, str]
    notes: list[str]

    def of(self, part: str) -> tuple[Tensor, Tensor]:
        """The inputs and targets of a part."""
        return self.x[self.rows[part]], self.y[self.rows[part]]


def divided_table(
    data: object,
    target: str,
    shares: Mapping[str, float],
    seed: int,
    *,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    group: str | None = None,
    time: str | None = None,
    task: str | None = None,
    reading: Reading | None = None,
    least: int = 0,
) -> DividedTable:
    """Read a table, divide its rows, infer the schema from the training rows, and encode all rows by it.

    Rows without a target are left out; `least` of the others are needed. The other arguments are those of `fit_table`.
    Raises ValueError with the reason if the table cannot be used.
    """
    notes: list[str] = []
    table, reading = training_table(data, reading, kinds, notes)
    if target not in table.column_names:
        raise ValueError(f"there is no column {target!r} to predict; there are {table.column_names}")
    known = has_target(table.column(target), reading.missing)
    if table.num_rows and not known.all():
        notes.append(
            f"{int((~known).sum())} of {len(known)} rows have no {target} and were left out"
            f"{_words(table.column(target), known)}"
        )
    keep = torch.from_numpy(known).nonzero().flatten()
    table = table.take(keep.numpy())
    if table.num_rows < least:
        raise ValueError(f"{table.num_rows} rows with a target are too few to train, calibrate and test on: {least}")
    apart = [name for name in (group, time) if name is not None]
    for name in apart:
        if name == target:
            raise ValueError(f"{name!r} is the target, by which rows cannot be split: give another column")
    ignore = (*ignore, *(name for name in apart if name not in (kinds or {})))
    parts = divide_table(table, target, task, ignore, shares, group, time, seed, reading)
    schema, left_out = infer(table, target, parts.rows["train"].numpy(), kinds, ignore, task, reading, notes)
    encoded = schema.encode(table)
    parts = parts.of_encoded(encoded.x)
    notes += parts.notes
    if encoded.rejected:
        row, reason = min(encoded.rejected.items())
        notes.append(
            f"{len(encoded.rejected)} rows could not be read and were left out, row {int(keep[row])}: {reason}"
        )
    y, labeled = schema.target.encode(table.column(target))
    usable = encoded.kept & labeled
    rows = {name: r[usable[r]] for name, r in parts.rows.items()}
    if empty := [name for name, r in rows.items() if len(r) == 0]:
        raise ValueError(f"no row of part {empty[0]!r} can be read")
    return DividedTable(schema, encoded.x, y, parts, rows, keep, left_out, notes)


def _words(column: ArrowColumn, known: np.ndarray) -> str:
    """The words for missing cells in a text column, as the end of a note; "" if all its missing cells are empty."""
    column = decoded(column)
    if not is_text(column.type):
        return ""
    words = {w for w in column.filter(arrow().array(~known)).unique().to_pylist() if w and w.strip()}
    return (
        f": {', '.join(map(repr, sorted(words)))} is read as missing (--missing says which words are)" if words else ""
    )
