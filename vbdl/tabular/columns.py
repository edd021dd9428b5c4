"""The kinds of input columns: what each remembers of the training rows, and how its cells become numbers.

A kind turns a whole Arrow column (`encode`) and a single Python value (`cell`) into the same float32 numbers, bit for
bit: both compute in float64 and round once. A missing cell is null or NaN. A cell that cannot be read is reported with
a reason and never guessed at.
"""

import datetime
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from vbdl.tabular import dates
from vbdl.tabular.numerals import Written
from vbdl.tabular.reading import NULLS, arrow, compute

DAY = 86_400.0
_MISSING = tuple(NULLS)


class Unreadable(ValueError):
    """Why a cell cannot be used."""


@dataclass
class Block:
    """A column as numbers: (rows, width) float64, and what was met on the way."""

    values: np.ndarray
    rejected: dict[int, str] = field(default_factory=dict)  # row -> reason
    missing: int = 0
    unseen: int = 0  # categories that the training rows did not have


def plain(value: Any) -> Any:
    """A cell of a row as Python's own type: NumPy's scalars as these, pandas' marks for a missing one as None."""
    if isinstance(value, np.generic):
        return value.item()
    return None if type(value).__name__ in ("NAType", "NaTType") else value


class _Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What all kinds share: a name, and the words that mean that a cell has no value."""

    name: str
    missing: tuple[str, ...] = _MISSING

    def is_missing(self, value: Any) -> bool:
        """Whether a cell of a row has no value: None, NaN, an empty text or one of the words."""
        if isinstance(value, str):
            word = value.strip()
            return not word or word in self.missing
        return value is None or (isinstance(value, float) and math.isnan(value))


class _Number(_Column, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What columns of numbers share: standardised by the training rows' mean and deviation, a missing cell replaced by
    their median and, where training had missing cells, told in a number of its own."""

    mean: float
    std: float
    fill: float  # of a missing cell: the training rows' median
    indicator: bool  # whether 1 stands behind the value of a missing cell

    @property
    def features(self) -> list[str]:
        return [self.name, f"{self.name} is missing"] if self.indicator else [self.name]

    def _scale(self, values: np.ndarray, missing: np.ndarray, rejected: dict[int, str]) -> Block:
        infinite = np.flatnonzero(np.isinf(values))
        for row in infinite.tolist():
            rejected[row] = f"column {self.name!r}: {values[row]} is not finite"
        unusable = missing | np.isinf(values)
        scaled = (np.where(unusable, self.fill, values) - self.mean) / self.std
        columns = [scaled, missing.astype(np.float64)] if self.indicator else [scaled]
        return Block(np.stack(columns, axis=1), rejected, int(missing.sum()))

    def _numbers(self, value: float | None) -> list[float]:
        if value is None or math.isnan(value):
            scaled, missing = (self.fill - self.mean) / self.std, 1.0
        elif math.isinf(value):
            raise Unreadable(f"column {self.name!r}: {value} is not finite")
        else:
            scaled, missing = (value - self.mean) / self.std, 0.0
        return [scaled, missing] if self.indicator else [scaled]


class Numeric(_Number, frozen=True, tag="numeric", forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Numbers; text in a table is read as numbers where it can be.

    written: how the training cells wrote them, where that was text that no program writes; rows may then have text too.
    """

    written: Written | None = None

    def encode(self, column: Any) -> Block:
        values, missing, rejected = floats(column, self.name, self.missing, self.written)
        return self._scale(values, missing, rejected)

    def cell(self, value: Any) -> list[float]:
        value = plain(value)
        if self.is_missing(value):
            return self._numbers(None)
        if isinstance(value, datetime.timedelta):
            value = value.total_seconds()
        if isinstance(value, str) and self.written is not None:
            number = self.written.number(value)
            value = value if number is None else number
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Unreadable(f"column {self.name!r}: {_short(value)} is not a number")
        try:
            return self._numbers(None if value is None else float(value))
        except OverflowError as error:
            raise Unreadable(f"column {self.name!r}: {_short(value)} is not finite") from error


class Boolean(_Number, frozen=True, tag="boolean", forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """True and false, also as 1 and 0 or as text."""

    def encode(self, column: Any) -> Block:
        values, missing, rejected = booleans(column, self.name, self.missing)
        return self._scale(values, missing, rejected)

    def cell(self, value: Any) -> list[float]:
        value = plain(value)
        if self.is_missing(value):
            return self._numbers(None)
        if value is not None and value not in (0, 1):  # True == 1 and False == 0
            raise Unreadable(f"column {self.name!r}: {_short(value)} is neither true nor false")
        return self._numbers(None if value is None else float(value))


class Date(_Number, frozen=True, tag="date", forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Dates and instants as days since 1970-01-01, UTC where they have a zone.

    order: how text and numbers without marks between them say a date, see `vbdl.tabular.dates`.
    """

    order: str = ""

    def encode(self, column: Any) -> Block:
        values, missing, rejected = days(column, self.name, self.missing, self.order)
        return self._scale(values, missing, rejected)

    def cell(self, value: Any) -> list[float]:
        value = plain(value)
        return self._numbers(None if self.is_missing(value) else _day(value, self.name, self.order))


class Categorical(
    _Column, frozen=True, tag="categorical", forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """One of several words, or codes: a number of its own each, 1 for the category of the row and 0 for the others.

    What training had too rarely, or never, shares the number `other`; a missing cell has its own where training had
    missing cells, and is `other` where it had none.
    """

    categories: tuple[str, ...]
    indicator: bool

    @property
    def features(self) -> list[str]:
        known = [f"{self.name} = {c}" for c in self.categories]
        return [*known, f"{self.name} is another", *([f"{self.name} is missing"] if self.indicator else [])]

    def encode(self, column: Any) -> Block:
        import pyarrow as pa

        pc = compute()

        try:
            words = without(texts(column), [w for w in self.missing if w not in self.categories])
        except pa.ArrowNotImplementedError as error:
            raise ValueError(f"column {self.name!r} holds {column.type}, not words or codes") from error
        missing = pc.is_null(words).to_numpy(zero_copy_only=False)
        # -1 where it is not among them
        found = pc.index_in(words, value_set=pa.array(self.categories, pa.string()))
        place = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        unseen = (place < 0) & ~missing
        if unseen.any():
            other = pc.fill_null(pc.match_substring_regex(words, r"^-?\d+(\.0+)?$"), False)
            for row in np.flatnonzero(unseen & other.to_numpy(zero_copy_only=False)).tolist():
                place[row] = self._place(words[row].as_py())
            unseen = (place < 0) & ~missing
        place = np.where(place < 0, len(self.categories), place)
        if self.indicator:
            place = np.where(missing, len(self.categories) + 1, place)
        values = np.zeros((len(place), len(self.features)))
        values[np.arange(len(place)), place] = 1.0
        return Block(values, {}, int(missing.sum()), int(unseen.sum()))

    def cell(self, value: Any) -> list[float]:
        value = plain(value)
        numbers = [0.0] * (len(self.categories) + 1 + self.indicator)
        if self.is_missing(value):
            numbers[-1] = 1.0  # the indicator where there is one, `other` where not
            return numbers
        if not isinstance(value, str | int | float):
            raise Unreadable(f"column {self.name!r}: {_short(value)} is not a category")
        place = self._place(text(value))
        numbers[len(self.categories) if place < 0 else place] = 1.0
        return numbers

    def is_missing(self, value: Any) -> bool:
        return super().is_missing(value) and value not in self.categories

    def knows(self, value: Any) -> bool:
        """Whether training had this category (a missing cell is not one)."""
        return self.is_missing(value) or self._place(text(value)) >= 0

    def _place(self, word: str) -> int:
        """The number of a category, -1 for one that training did not have. A code that one file has as 7 and another
        as 7.0 is one code."""
        for form in (word, word.rstrip("0").removesuffix(".") if _WHOLE.fullmatch(word) else f"{word}.0"):
            if form in self.categories:
                return self.categories.index(form)
        return -1


Column = Numeric | Boolean | Date | Categorical


# -- Arrow columns as arrays


def text(value: str | int | float | bool) -> str:
    """The word for a category given in another type; what Arrow's cast to text writes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


_WHOLE = re.compile(r"-?\d+\.0+")


def without(words: Any, missing: Sequence[str]) -> Any:
    """An Arrow array of text, null where a cell is empty or one of these words."""
    import pyarrow as pa

    pc = compute()
    bare = pc.utf8_trim_whitespace(words)
    return pc.if_else(pc.is_in(bare, value_set=pa.array(["", *missing], words.type)), None, words)


def counted(words: Any) -> dict[str, int]:
    """{word: how often} of an Arrow array of text, null not counted."""
    found = compute().value_counts(words)
    return {str(e["values"]): e["counts"] for e in found.to_pylist() if e["values"] is not None}


def texts(column: Any) -> Any:
    """An Arrow column as one array of text."""
    import pyarrow as pa

    pc = compute()

    column = combined(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column.cast(pa.string())


def combined(column: Any) -> Any:
    """A chunked column as one array."""
    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks()
        if hasattr(column, "chunks"):  # an empty column has stayed chunked
            import pyarrow as pa

            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is of text."""
    types = arrow().types
    return types.is_string(kind) or types.is_large_string(kind)


def decoded(column: Any) -> Any:
    """An Arrow column as one array of its values' own type: no chunks, no dictionary."""
    import pyarrow as pa

    column = combined(column)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def floats(
    column: Any, name: str, missing: Sequence[str] = _MISSING, written: Written | None = None
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """(rows,) float64 with NaN for what is missing, where it is missing, and the rows that cannot be read.

    missing: words that mean so. written: how text writes numbers, as programs do unless given.
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
    """(rows,) bool, where a value is missing and not one that cannot be read; and what cannot."""
    missing = np.isnan(values)
    missing[list(rejected)] = False
    return missing, rejected


def _parsed(column: Any, name: str, rejected: dict[int, str], written: Written | None) -> np.ndarray:
    """Text as numbers; whole columns in one go, and cell by cell only where that fails."""
    import pyarrow as pa

    pc = compute()

    if written is None:
        try:
            return pc.utf8_trim_whitespace(column).cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            pass

    def number(word: str) -> float:
        try:
            found = pa.scalar(word.strip()).cast(pa.float64()).as_py() if written is None else written.number(word)
        except pa.ArrowInvalid:
            found = None
        if found is None:
            raise Unreadable(f"column {name!r}: {_short(word)} is not a number")
        return found

    return _each(column, number, rejected)


def _each(column: Any, read: Callable[[str], float], rejected: dict[int, str]) -> np.ndarray:
    """(rows,) what `read` makes of the cells of an Arrow array of text, NaN for null; each different cell is read once,
    and one that is Unreadable rejects its rows."""
    coded = column.dictionary_encode()
    found, reasons = np.full(len(coded.dictionary), np.nan), {}
    for place, word in enumerate(coded.dictionary.to_pylist()):
        try:
            found[place] = read(word)
        except Unreadable as error:
            reasons[place] = str(error)
    where = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    if reasons:
        for row in np.flatnonzero(np.isin(where, list(reasons))).tolist():
            rejected[row] = reasons[int(where[row])]
    return np.append(found, np.nan)[where]


_TRUE, _FALSE = ("true", "1", "yes", "t", "y"), ("false", "0", "no", "f", "n")


def booleans(
    column: Any, name: str, missing: Sequence[str] = _MISSING
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """(rows,) 1, 0 or NaN for what is missing, where it is missing, and the rows that cannot be read."""
    import pyarrow as pa

    column = decoded(column)
    if pa.types.is_boolean(column.type):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return values, np.isnan(values), {}
    rejected: dict[int, str] = {}

    def truth(word: str) -> float:
        if (bare := word.strip().lower()) not in _TRUE + _FALSE:
            raise Unreadable(f"column {name!r}: {_short(word)} is neither true nor false")
        return float(bare in _TRUE)

    if is_text(column.type):
        values = _each(without(column, missing), truth, rejected)
    else:
        values, _, rejected = floats(column, name)
        for row in np.flatnonzero(~np.isnan(values) & (values != 0) & (values != 1)).tolist():
            rejected[row] = f"column {name!r}: {values[row]} is neither true nor false"
            values[row] = np.nan
    return values, *_apart(values, rejected)


def days(
    column: Any, name: str, missing: Sequence[str] = _MISSING, order: str = ""
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """(rows,) days since 1970-01-01, NaN for what is missing, where it is missing, and the rows that cannot be read.

    order: of text and of whole numbers such as 20260131, see `vbdl.tabular.dates`.
    """
    import pyarrow as pa

    column = decoded(column)
    rejected: dict[int, str] = {}
    if pa.types.is_date(column.type):
        values = column.cast(pa.date32()).cast(pa.int32()).cast(pa.float64()).to_numpy(zero_copy_only=False)
    elif pa.types.is_timestamp(column.type):
        micros = column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64()).cast(pa.float64(), False)
        values = micros.to_numpy(zero_copy_only=False) / 1e6 / DAY
    elif pa.types.is_null(column.type):
        values = np.full(len(column), np.nan)
    elif is_text(column.type) or pa.types.is_integer(column.type):
        words = without(texts(column), missing)
        values = _each(words, lambda word: _day(word, name, order), rejected)
    else:
        raise ValueError(f"column {name!r} holds {column.type}, not dates")
    return values, *_apart(values, rejected)


def _day(value: Any, name: str, order: str = "") -> float:
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        try:
            return dates.micros(dates.instant(str(value), order)) / 1e6 / DAY
        except dates.NoDate as error:
            raise Unreadable(f"column {name!r}: {error}") from error
    try:
        when: Any = value
        if isinstance(when, datetime.date) and not isinstance(when, datetime.datetime):
            when = datetime.datetime(when.year, when.month, when.day)
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.UTC)
        return dates.micros(when) / 1e6 / DAY
    except (ValueError, AttributeError, TypeError) as error:
        raise Unreadable(f"column {name!r}: {_short(value)} is not a date (2026-11-22 or 2026-11-22T18:30)") from error


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 40 else said[:37] + "..."
