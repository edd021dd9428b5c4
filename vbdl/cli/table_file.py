"""The options of commands that train on a table: which file, how it is read, and how its rows are divided."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vbdl import plugins

if TYPE_CHECKING:
    from torch import Tensor

    from vbdl.tabular import Schema
    from vbdl.tabular.reading import Reading


@dataclass(frozen=True)
class TableFile:
    """A table with the column to predict, and how to read and divide it."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File or folder of files."""
    target: str
    """Column to predict."""
    task: Literal["classification", "regression"] | None = None
    """Kind of prediction; inferred from the target's cells unless given."""
    ignore: tuple[str, ...] = ()
    """Columns to leave out."""
    numeric: tuple[str, ...] = ()
    """Columns to read as numbers."""
    categorical: tuple[str, ...] = ()
    """Columns to read as categories, for example codes made of digits."""
    date: tuple[str, ...] = ()
    """Columns of dates to read as days since 1970; the time of day is a fraction of a day."""
    separator: str | None = None
    """Character that separates the cells of CSV files; inferred from the first line unless given."""
    encoding: str | None = None
    """Encoding of CSV files, like utf-8, latin-1, cp1252 or utf-16; utf-8 unless given."""
    decimal: str | None = None
    """Decimal mark; inferred from the cells unless given."""
    thousands: str | None = None
    """Thousands separator; inferred from the cells unless given."""
    missing: tuple[str, ...] | None = None
    """Words for a missing cell, besides an empty cell; NA N/A NaN NULL None and similar ones unless given."""
    date_format: str | None = None
    """Format of dates in text: day-first, month-first, year-first, or one like %d.%m.%Y; inferred unless given."""
    group: str | None = None
    """Column of groups, like patients or customers: all rows of a group go to one part of the split."""
    time: str | None = None
    """Column of times: split by time, so that each part of the split is later than the one before."""
    plugin: tuple[Path, ...] = ()
    """Python files that register methods of your own with @vbdl.register(name=...). Their code is run."""

    def __post_init__(self) -> None:
        for path in self.plugin:
            plugins.load(path)

    def kinds(self) -> dict[str, str]:
        """The kinds of the columns that an option names, as `vbdl.tabular.infer` takes them."""
        from vbdl.tabular.inference import kinds_of

        return kinds_of(self.numeric, self.categorical, self.date)

    def reading(self) -> "Reading":
        """How files are read and how text writes missing cells, numbers and dates."""
        from vbdl.tabular.reading import NULLS, Reading

        missing = tuple(NULLS) if self.missing is None else self.missing
        separator = "\t" if self.separator in ("\\t", "tab") else self.separator
        return Reading(
            separator=separator, encoding=self.encoding, decimal=self.decimal, thousands=self.thousands,
            missing=missing, date_format=self.date_format,
        )  # fmt: skip

    def words(self) -> str:
        """The table and its options as a shell takes them, without those that have their default."""
        words = [str(self.data)]
        for field in dataclasses.fields(TableFile)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"--{field.name.replace('_', '-')}")
                words += [value] if isinstance(value, str) else map(str, value)
        return shlex.join(words)


def print_columns(schema: "Schema", left_out: Mapping[str, str]) -> None:
    """Print the inputs and the target, and the reason for each column that is left out."""
    print(schema)
    for name, reason in left_out.items():
        print(f"  {name:24s} {'left out':12s} {reason}")


def print_rows(rows: "Mapping[str, Tensor]", split: str, notes: Iterable[str]) -> None:
    """Print the number of rows of each part, how they were divided, and notes."""
    parts = ", ".join(f"{len(chosen)} {name}" for name, chosen in rows.items())
    print(f"rows:   {parts}; {split}")
    for note in notes:
        print(f"note:   {note}")
