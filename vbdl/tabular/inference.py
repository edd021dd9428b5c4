"""A schema from a table: which columns are inputs, of what kind, and what the training rows say of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vbdl.tabular import dates
from vbdl.tabular.cells import booleans, combined, counted, days, decoded, floats, is_text, texts, without
from vbdl.tabular.columns import Boolean, Categorical, Column, Date, Numeric
from vbdl.tabular.numerals import PLAIN, Ambiguous, Mostly, Recognised, Written, code_like, marks, recognise
from vbdl.tabular.reading import Reading, as_table
from vbdl.tabular.schema import Schema
from vbdl.tabular.target import fit_target

KINDS = ("numeric", "categorical", "boolean", "date", "ignore")
MAX_CATEGORIES = 64  # the most frequent ones; the rest is `other`
MIN_ROWS = 5  # of a category with a number of its own


def kinds_of(numeric: Sequence[str] = (), categorical: Sequence[str] = (), date: Sequence[str] = ()) -> dict[str, str]:
    """{column: kind} for `infer`. ValueError where a column is in two of the lists."""
    kinds: dict[str, str] = {}
    for kind, names in (("numeric", numeric), ("categorical", categorical), ("date", date)):
        for name in names:
            if name in kinds:
                raise ValueError(f"column {name!r} is said to be {kinds[name]} and {kind}")
            kinds[name] = kind
    return kinds


def infer(
    table: Any,
    target: str,
    training: np.ndarray | None = None,
    kinds: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    task: str | None = None,
    reading: Reading | None = None,
    notes: list[str] | None = None,
) -> tuple[Schema, dict[str, str]]:
    """The schema, and the columns that are not inputs with the reason.

    table: a pyarrow.Table. training: the rows whose means, medians and categories are taken; all unless given.
    kinds: column -> numeric, categorical, boolean, date or ignore, in place of what its type says.
    task: classification or regression, in place of what the target's cells say. reading: what words, marks in numbers
    and dates mean; the schema keeps it. notes: gets what was recognised in text.

    Numbers are numeric, and so is text of which every cell is a number; other text and dictionaries are categorical.
    ValueError for dates, lists and other types that no kind is
    chosen for: what they mean to the target is not for a program to guess.
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
        cells = _Cells(name, table.column(name), rows, reading, decimal, notes)
        found = cells.column(kinds.get(name))
        if isinstance(found, str):
            left_out[name] = found
        else:
            columns.append(found)
    if not columns:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no column is left to predict {target!r} from. {why}")
    made = fit_target(table.column(target), target, rows, task, reading)
    return Schema(columns=tuple(columns), target=made, reading=reading), left_out


class _Cells:
    """A column of the table, and what is found out about it."""

    def __init__(
        self, name: str, column: Any, rows: np.ndarray, reading: Reading, decimal: str | None, notes: list[str]
    ):
        import pyarrow as pa

        self.name, self.rows, self.reading, self.decimal, self.notes = name, rows, reading, decimal, notes
        self.whole = combined(column)
        self.training = self.whole.take(pa.array(rows))
        self.missing = reading.missing
        self.written: Written | None = None
        self.order = ""

    def column(self, kind: str | None) -> Column | str:
        """The column, or why it is not an input."""
        import pyarrow as pa

        if pa.types.is_null(self.whole.type):
            return "it has no value in any row"
        mostly = None
        if kind in (None, "numeric") and is_text(self.whole.type if kind is None else decoded(self.whole).type):
            found = self._numbers(kind)
            mostly = found if isinstance(found, Mostly) else None
            kind = "numeric" if isinstance(found, Recognised) else kind
        kind = kind or _kind(self.name, self.whole)
        if kind == "categorical":
            found = self._categorical(mostly)
        else:
            self._read_text(kind)
            found = self._number(kind, mostly)
        self._say_missing()
        return found

    def _numbers(self, kind: str | None) -> Recognised | Mostly | None:
        """How the cells write numbers, if they do; what is said about it goes to the notes."""
        counts = counted(without(decoded(self.whole), self.missing))
        try:
            found = recognise(counts, self.name, self.decimal, self.reading.thousands)
        except Ambiguous as error:
            raise ValueError(f"{error}, or --categorical {self.name} or --ignore {self.name}") from error
        if not isinstance(found, Recognised):
            return found
        if kind is None and code_like(list(counts)):
            self.notes.append(f"column {self.name!r} has digits behind a zero: codes (--numeric {self.name}: numbers)")
            return None
        self.written, self.missing = found.written, (*self.missing, *found.missing)
        word, number = found.example
        said = f"{word!r} is {number:.12g}" if found.written != PLAIN else "as every cell is one"
        if found.missing:
            said += f", {', '.join(map(repr, found.missing))} {'is' if len(found.missing) == 1 else 'are'} missing"
        self.notes.append(f"column {self.name!r} is text read as numbers, {said} (--categorical {self.name}: words)")
        return found

    def _read_text(self, kind: str) -> None:
        """How text says dates, and which words of a column of dates or of truth are marks for a missing one."""
        import pyarrow as pa

        column = decoded(self.whole)
        text = is_text(column.type)
        if kind not in ("date", "boolean") or not (text or pa.types.is_integer(column.type)):
            return
        words = list(counted(without(texts(column), self.missing)))
        if found := marks(words) if text else ():
            self.missing = (*self.missing, *found)
            self.notes.append(f"column {self.name!r}: {', '.join(map(repr, found))} is read as missing")
        if kind == "boolean":
            return
        if self.reading.date_format is not None:
            self.order = self.reading.date_format
            return
        try:  # what is no date at all is said where the cells are read
            self.order = dates.order_of([w for w in words if dates.readings(w.strip())], self.name)
        except dates.NoDate as error:
            raise ValueError(f"column {self.name!r}: {error}") from error
        if self.order:
            self.notes.append(f"column {self.name!r} is read as dates, {self.order.replace('-', ' ')} (--date-format)")

    def _number(self, kind: str, mostly: Mostly | None) -> Column | str:
        name, rows = self.name, self.rows
        options: dict[str, Any] = {"missing": self.missing}
        if kind == "numeric" and self.reading.decimal == "," and self.written is None:
            self.written = Written(decimal=",")  # in the files that are read later
        if kind == "date":
            values, missing, rejected = days(self.training, name, self.missing, self.order)
            options["order"] = self.order
        elif kind == "boolean":
            values, missing, rejected = booleans(self.training, name, self.missing)
        else:
            values, missing, rejected = floats(self.training, name, self.missing, self.written)
            options["written"] = self.written
        if rejected:
            row, reason = min(rejected.items())
            hint = "" if mostly is None else f" ({_options(mostly)})"
            raise ValueError(f"row {int(rows[row])}, {reason}; {len(rejected)} such cells in training rows{hint}")
        known = values[~missing & np.isfinite(values)]
        if len(known) == 0:
            return "it has no value in any training row"
        with np.errstate(over="ignore", invalid="ignore"):
            spread = float(known.std())
        if not np.isfinite(spread):
            largest = float(np.abs(known).max())
            raise ValueError(
                f"column {name!r} has {largest:g} in it, too large to scale by: is it a code for a missing cell?"
            )
        if not spread > 0 and not missing.any():
            return f"it is {known[0]:g} in every training row"
        make: Any = {"numeric": Numeric, "boolean": Boolean, "date": Date}[kind]
        return make(
            name=name,
            mean=float(known.mean()),
            std=spread or 1.0,
            fill=float(np.median(known)),
            indicator=bool(missing.any()),
            **options,
        )

    def _categorical(self, mostly: Mostly | None) -> Categorical | str:
        words = without(texts(self.training), self.missing)
        seen = counted(words)
        if not seen:
            return "it has no value in any training row"
        rows = sum(seen.values())
        often = sorted((w for w, n in seen.items() if n >= MIN_ROWS), key=lambda w: (-seen[w], w))
        hint = ""
        if mostly is not None:
            hint = f"; {mostly.share:.1%} of its cells are numbers ({_options(mostly)})"
        elif often == [] and _dated(list(seen)[:200]):
            hint = f"; its cells are dates (--date {self.name}, or, in vbdl fit, --time {self.name})"
        if not often or (len(seen) > 20 and len(seen) > rows / 2):
            different = f"it has {len(seen)} different values in {rows} training rows"
            return f"{different}: an id or free text, not categories{hint}"
        if len(seen) == 1 and words.null_count == 0:
            return f"it is {often[0]!r} in every training row"
        if mostly is not None:
            self.notes.append(f"column {self.name!r} is read as categories{hint}")
        known = tuple(sorted(often[:MAX_CATEGORIES]))
        return Categorical(name=self.name, categories=known, indicator=words.null_count > 0, missing=self.missing)

    def _say_missing(self) -> None:
        """A note for words in memory, or in Parquet, that are read as no value: they were written for a reason."""
        column = decoded(self.whole)
        if not is_text(column.type):
            return
        counts = {w: n for w, n in counted(column).items() if w.strip() in self.reading.missing and w.strip()}
        if counts:
            said = ", ".join(f"{n} times {w!r}" for w, n in counts.items())
            self.notes.append(f"column {self.name!r}: {said} is read as missing (--missing says which words are)")


def _options(found: Mostly) -> str:
    shown = ", ".join(map(repr, found.others[:3])) + (", ..." if len(found.others) > 3 else "")
    return f"{shown} are not: --missing, --thousands and --decimal say what they are"


def _dated(words: list[str]) -> bool:
    """Whether these are dates in some order."""
    try:
        dates.order_of(words, "")
    except dates.NoDate:
        return False
    except ValueError:
        return True
    return True


def _decimal_of_others(table: Any, kinds: Mapping[str, str], reading: Reading) -> str | None:
    """The decimal mark that columns of text have which allow one only, None where there is none."""
    for name in table.column_names:
        column = decoded(table.column(name))
        if not is_text(column.type) or kinds.get(name, "numeric") != "numeric":
            continue
        try:
            found = recognise(counted(without(column, reading.missing)), name, None, reading.thousands)
        except Ambiguous:
            continue
        if isinstance(found, Recognised) and "," in (found.written.decimal, found.written.thousands):
            return found.written.decimal
    return None


def training_table(
    data: Any, reading: Reading | None, kinds: Mapping[str, str] | None, notes: list[str]
) -> tuple[Any, Reading]:
    """The table of this data, and how its files were read: with decimal commas where a column of them shows it.
    notes: gets what was recognised."""
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


def _kind(name: str, column: Any) -> str:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return "numeric"
    if pa.types.is_duration(kind):
        return "numeric"
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "categorical"
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        raise ValueError(
            f"column {name!r} holds dates, and what a date means to the target is not known: leave it out (--ignore "
            f"{name}), read it as days since 1970 (--date {name}), or, in vbdl fit, split by it (--time {name})"
        )
    raise ValueError(f"column {name!r} holds {kind}, which is no kind of input: leave it out (--ignore {name})")
