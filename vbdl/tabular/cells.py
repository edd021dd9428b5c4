"""Conversion of a table's cells to numbers and words, by the same rules for Arrow columns and single values.

A missing cell is null, NaN, empty text or one of a column's own words for it. A cell that cannot be read is reported
with a reason and never guessed at.
"""

import datetime
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vbdl.tabular import dates
from vbdl.tabular.numerals import Written
from vbdl.tabular.reading import NULLS, ArrowColumn, arrow, compute

if TYPE_CHECKING:
    import pyarrow

MISSING = tuple(NULLS)
_DAY = 86_400.0  # seconds


class Unreadable(ValueError):
    """Raised for a cell that cannot be used, with the reason."""


def plain(value: object) -> object:
    """The value of a cell as a built-in type of Python; None in place of pandas' NA and NaT."""
    if isinstance(value, np.generic):
        return value.item()
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def text(value: str | int | float | bool) -> str:
    """The text of a category given as a number or truth value, equal to the text of Arrow's cast."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


WHOLE = re.compile(r"-?\d+\.0+")


def without(words: "pyarrow.Array", missing: Sequence[str]) -> "pyarrow.Array":
    """The array of text with null instead of empty cells and of words for a missing cell."""
    import pyarrow as pa

    pc = compute()
    bare = pc.utf8_trim_whitespace(words)
    return pc.if_else(pc.is_in(bare, value_set=pa.array(["", *missing], words.type)), None, words)


def counted(words: "pyarrow.Array") -> dict[str, int]:
    """{word: count} of an array of text; null is not counted."""
    counts = compute().value_counts(words)
    return {str(e["values"]): e["counts"] for e in counts.to_pylist() if e["values"] is not None}


def texts(column: ArrowColumn) -> "pyarrow.Array":
    """The column as one array of text."""
    import pyarrow as pa

    pc = compute()

    column = combined(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column.cast(pa.string())


def combined(column: ArrowColumn) -> "pyarrow.Array":
    """The column as one array without chunks."""
    pa = arrow()
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # an empty column stays chunked
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column


def is_text(kind: "pyarrow.DataType") -> bool:
    """Whether an Arrow type is a type of text."""
    types = arrow().types
    return types.is_string(kind) or types.is_large_string(kind)


def decoded(column: ArrowColumn) -> "pyarrow.Array":
    """The column as one array without chunks and without dictionary encoding."""
    import pyarrow as pa

    column = combined(column)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def floats(
    column: ArrowColumn, name: str, missing: Sequence[str] = MISSING, written: Written | None = None
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Read a column of numbers: (values (rows,) float64 with NaN for missing cells, (rows,) bool missing, {row: reason}
    of the cells that cannot be read).

    missing: words for a missing cell. written: notation of numbers in text; that of programs unless given.
    """
    import pyarrow as pa

    column = decoded(column)
    rejected: dict[int, str] = {}
    kind = column.type
    if pa.types.is_null(kind):
        values = np.full(len(column), np.nan)
    elif is_text(kind):
        values = _parsed(without(column, missing), name, rejected, written)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    elif pa.types.is_duration(kind):  # seconds
        micros = column.cast(pa.duration("us"), safe=False).cast(pa.int64()).cast(pa.float64(), safe=False)
        values = micros.to_numpy(zero_copy_only=False) / 1e6
    else:
        raise ValueError(f"column {name!r} holds {kind}, not numbers")
    return values, *_apart(values, rejected)


def _apart(values: np.ndarray, rejected: dict[int, str]) -> tuple[np.ndarray, dict[int, str]]:
    """Return ((rows,) bool missing, {row: reason} rejected); a cell that cannot be read does not count as missing."""
    missing = np.isnan(values)
    missing[list(rejected)] = False
    return missing, rejected


def _parsed(column: "pyarrow.Array", name: str, rejected: dict[int, str], written: Written | None) -> np.ndarray:
    """The numbers in an array of text: converted as a whole, or cell by cell if that fails."""
    import pyarrow as pa

    pc = compute()

    if written is None:
        try:
            return pc.utf8_trim_whitespace(column).cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            pass

    def number(word: str) -> float:
        try:
            value = pa.scalar(word.strip()).cast(pa.float64()).as_py() if written is None else written.number(word)
        except pa.ArrowInvalid:
            value = None
        if value is None:
            notation = "" if written is None else f" in the notation of the training table ({written})"
            raise Unreadable(f"column {name!r}: {short(word)} is not a number{notation}")
        return value

    return _each(column, number, rejected)


def _each(column: "pyarrow.Array", read: Callable[[str], float], rejected: dict[int, str]) -> np.ndarray:
    """Return (rows,) the results of `read` for the cells of an Arrow array of text, NaN for null.

    Each different cell is read once; a cell for which `read` raises Unreadable rejects its rows.
    """
    coded = column.dictionary_encode()
    numbers, reasons = np.full(len(coded.dictionary), np.nan), {}
    for place, word in enumerate(coded.dictionary.to_pylist()):
        try:
            numbers[place] = read(word)
        except Unreadable as error:
            reasons[place] = str(error)
    where = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    if reasons:
        for row in np.flatnonzero(np.isin(where, list(reasons))).tolist():
            rejected[row] = reasons[int(where[row])]
    return np.append(numbers, np.nan)[where]


TRUE, FALSE = ("true", "1", "yes", "t", "y"), ("false", "0", "no", "f", "n")


def booleans(
    column: ArrowColumn, name: str, missing: Sequence[str] = MISSING
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Read a column of truth values: (values 1, 0 or NaN for missing, (rows,) bool missing, {row: reason})."""
    import pyarrow as pa

    column = decoded(column)
    if pa.types.is_boolean(column.type):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return values, np.isnan(values), {}
    rejected: dict[int, str] = {}

    def truth(word: str) -> float:
        if (bare := word.strip().lower()) not in TRUE + FALSE:
            raise Unreadable(f"column {name!r}: {short(word)} is neither true nor false")
        return float(bare in TRUE)

    if is_text(column.type):
        values = _each(without(column, missing), truth, rejected)
    else:
        values, _, rejected = floats(column, name)
        for row in np.flatnonzero(~np.isnan(values) & (values != 0) & (values != 1)).tolist():
            rejected[row] = f"column {name!r}: {values[row]} is neither true nor false"
            values[row] = np.nan
    return values, *_apart(values, rejected)


def days(
    column: ArrowColumn, name: str, missing: Sequence[str] = MISSING, order: str = ""
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Read a column of dates: (days since 1970-01-01 or NaN for missing, (rows,) bool missing, {row: reason}).

    order: how text and whole numbers such as 20260131 write dates, see `vbdl.tabular.dates`.
    """
    import pyarrow as pa

    column = decoded(column)
    rejected: dict[int, str] = {}
    if pa.types.is_date(column.type):
        values = column.cast(pa.date32()).cast(pa.int32()).cast(pa.float64()).to_numpy(zero_copy_only=False)
    elif pa.types.is_timestamp(column.type):
        micros = column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64()).cast(pa.float64(), False)
        values = micros.to_numpy(zero_copy_only=False) / 1e6 / _DAY
    elif pa.types.is_null(column.type):
        values = np.full(len(column), np.nan)
    elif is_text(column.type) or pa.types.is_integer(column.type):
        words = without(texts(column), missing)
        values = _each(words, lambda word: day(word, name, order), rejected)
    else:
        raise ValueError(f"column {name!r} holds {column.type}, not dates")
    return values, *_apart(values, rejected)


def day(value: object, name: str, order: str = "") -> float:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        try:
            return dates.micros(dates.instant(str(value), order)) / 1e6 / _DAY
        except dates.NoDate as error:
            raise Unreadable(f"column {name!r}: {error}") from error
    try:
        if not isinstance(value, datetime.date):
            raise TypeError
        when = value if isinstance(value, datetime.datetime) else datetime.datetime(*value.timetuple()[:3])
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.UTC)
        return dates.micros(when) / 1e6 / _DAY
    except (ValueError, TypeError) as error:
        raise Unreadable(f"column {name!r}: {short(value)} is not a date (2026-11-22 or 2026-11-22T18:30)") from error


def short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
