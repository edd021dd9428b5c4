"""Inference of a schema from a table: the input columns, their kinds, and statistics of the training rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from vbdl.tabular import dates
from vbdl.tabular.cells import counted, decoded, is_text, without
from vbdl.tabular.column_inference import ColumnCells
from vbdl.tabular.columns import Column
from vbdl.tabular.numerals import Ambiguous, Recognized, recognize
from vbdl.tabular.reading import Reading, as_table
from vbdl.tabular.schema import Schema
from vbdl.tabular.target import fit_target

if TYPE_CHECKING:
    import pyarrow

KINDS = ("numeric", "categorical", "boolean", "date", "ignore")


def kinds_of(numeric: Sequence[str] = (), categorical: Sequence[str] = (), date: Sequence[str] = ()) -> dict[str, str]:
    """Return {column: kind} for `infer`. Raises ValueError if a column is in two of the lists."""
    kinds: dict[str, str] = {}
    for kind, names in (("numeric", numeric), ("categorical", categorical), ("date", date)):
        for name in names:
            if name in kinds:
                raise ValueError(f"column {name!r} is listed as {kinds[name]} and as {kind}: leave one of them out")
            kinds[name] = kind
    return kinds


def infer(
    table: "pyarrow.Table",
    target: str,
    training: np.ndarray | None = None,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    task: str | None = None,
    reading: Reading | None = None,
    notes: list[str] | None = None,
) -> tuple[Schema, dict[str, str]]:
    """Infer the schema of a table; returns it and {column: reason} of the columns that are not inputs.

    table: a pyarrow.Table. training: the rows whose means, medians and categories are taken; all unless given.
    kinds: {column: kind}: numeric, categorical, boolean, date or ignore; inferred from its type unless given.
    task: classification or regression; inferred from the target's cells unless given. reading: how text writes
    missing cells, numbers and dates; the schema keeps it. notes: receives notes about the notation of text.

    Numbers are numeric, and so is text of which every cell is a number; other text and dictionaries are categorical.
    Raises ValueError for dates, lists and other types without a given kind, because their meaning cannot be inferred.
    """
    table = as_table(table)
    names, there = table.column_names, set(table.column_names)
    reading, notes = reading or Reading(), [] if notes is None else notes
    kinds = {**(kinds or {}), **{name: "ignore" for name in ignore}}
    for name in [target, *kinds]:
        if name not in there:
            raise ValueError(f"there is no column {name!r}; there are {names}")
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise ValueError(f"column {name!r}: kind {kind!r} is none of {', '.join(KINDS)}")
    rows = np.arange(table.num_rows) if training is None else training
    decimal = reading.decimal or _decimal_of_others(table, kinds, reading)
    columns: list[Column] = []
    left_out: dict[str, str] = {}
    for name in names:
        if name == target:
            continue
        if kinds.get(name) == "ignore":
            left_out[name] = "as asked"
            continue
        cells = ColumnCells(name, table.column(name), rows, reading, decimal, notes)
        column = cells.column(kinds.get(name))
        if isinstance(column, str):
            left_out[name] = column
        else:
            columns.append(column)
    if not columns:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no column is left to predict {target!r} from. {why}")
    fitted = fit_target(table.column(target), target, rows, task, reading)
    return Schema(columns=tuple(columns), target=fitted, reading=reading), left_out


def _decimal_of_others(table: "pyarrow.Table", kinds: Mapping[str, str], reading: Reading) -> str | None:
    """The decimal mark of the text columns in which only one mark is possible, or None if there is no such column."""
    for name in table.column_names:
        column = decoded(table.column(name))
        if not is_text(column.type) or kinds.get(name, "numeric") != "numeric":
            continue
        try:
            recognized = recognize(counted(without(column, reading.missing)), name, None, reading.thousands)
        except Ambiguous:
            continue
        if isinstance(recognized, Recognized) and "," in (recognized.written.decimal, recognized.written.thousands):
            return recognized.written.decimal
    return None


def training_table(
    data: object, reading: Reading | None, kinds: Mapping[str, str] | None, notes: list[str]
) -> "tuple[pyarrow.Table, Reading]":
    """Return the table of this data and how its files are read, with decimal commas if a column shows them.

    notes: receives notes about the notation."""
    reading = reading or Reading()
    if reading.date_format is not None:
        dates.check_order(reading.date_format)
    codes = tuple(name for name, kind in (kinds or {}).items() if kind == "categorical")
    of_files = msgspec.structs.replace(reading, text=codes)
    table = as_table(data, of_files, notes)
    if (
        reading.decimal is None
        and isinstance(data, str | Path)
        and _decimal_of_others(table, kinds or {}, reading) == ","
    ):
        reading = msgspec.structs.replace(reading, decimal=",")
        table = as_table(data, msgspec.structs.replace(of_files, decimal=","))
        notes.append("numbers have ',' before their decimals (--decimal . says otherwise)")
    return table, reading
