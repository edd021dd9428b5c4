"""The kinds of input columns: what each remembers of the training rows, and how its cells become numbers.

A kind turns a whole Arrow column (`encode`) and a single Python value (`cell`) into the same float32 numbers, bit for
bit: both compute in float64 and round once. A missing cell is null or NaN. A cell that cannot be read is reported with
a reason and never guessed at.
"""

import datetime
import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from vbdl.tabular.reading import NULLS, compute

DAY = 86_400.0


class Unreadable(ValueError):
    """Why a cell cannot be used."""


@dataclass
class Block:
    """A column as numbers: (rows, width) float64, and what was met on the way."""

    values: np.ndarray
    rejected: dict[int, str] = field(default_factory=dict)  # row -> reason
    missing: int = 0
    unseen: int = 0  # categories that the training rows did not have


class _Number(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What columns of numbers share: standardised by the training rows' mean and deviation, a missing cell replaced by
    their median and, where training had missing cells, told in a number of its own."""

    name: str
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


class Numeric(_Number, frozen=True, tag="numeric", forbid_unknown_fields=True, kw_only=True):
    """Numbers; text in a table is read as numbers where it can be."""

    def encode(self, column: Any) -> Block:
        values, missing, rejected = floats(column, self.name)
        return self._scale(values, missing, rejected)

    def cell(self, value: Any) -> list[float]:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Unreadable(f"column {self.name!r}: {_short(value)} is not a number")
        try:
            return self._numbers(None if value is None else float(value))
        except OverflowError as error:
            raise Unreadable(f"column {self.name!r}: {_short(value)} is not finite") from error


class Boolean(_Number, frozen=True, tag="boolean", forbid_unknown_fields=True, kw_only=True):
    """True and false, also as 1 and 0 or as text."""

    def encode(self, column: Any) -> Block:
        values, missing, rejected = booleans(column, self.name)
        return self._scale(values, missing, rejected)

    def cell(self, value: Any) -> list[float]:
        if value is not None and value not in (0, 1):  # True == 1 and False == 0
            raise Unreadable(f"column {self.name!r}: {_short(value)} is neither true nor false")
        return self._numbers(None if value is None else float(value))


class Date(_Number, frozen=True, tag="date", forbid_unknown_fields=True, kw_only=True):
    """Dates and instants as days since 1970-01-01, UTC where they have a zone."""

    def encode(self, column: Any) -> Block:
        values, missing, rejected = days(column, self.name)
        return self._scale(values, missing, rejected)

    def cell(self, value: Any) -> list[float]:
        return self._numbers(None if value is None else _day(value, self.name))


class Categorical(msgspec.Struct, frozen=True, tag="categorical", forbid_unknown_fields=True, kw_only=True):
    """One of several words, or codes: a number of its own each, 1 for the category of the row and 0 for the others.

    What training had too rarely, or never, shares the number `other`; a missing cell has its own where training had
    missing cells, and is `other` where it had none.
    """

    name: str
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
            words = texts(column)
        except pa.ArrowNotImplementedError as error:
            raise ValueError(f"column {self.name!r} holds {column.type}, not words or codes") from error
        missing = pc.is_null(words).to_numpy(zero_copy_only=False)
        # -1 where it is not among them
        found = pc.index_in(words, value_set=pa.array(self.categories, pa.string()))
        place = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        unseen = (place < 0) & ~missing
        place = np.where(place < 0, len(self.categories), place)
        if self.indicator:
            place = np.where(missing, len(self.categories) + 1, place)
        values = np.zeros((len(place), len(self.features)))
        values[np.arange(len(place)), place] = 1.0
        return Block(values, {}, int(missing.sum()), int(unseen.sum()))

    def cell(self, value: Any) -> list[float]:
        numbers = [0.0] * len(self.features)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            numbers[-1] = 1.0  # the indicator where there is one, `other` where not
            return numbers
        if not isinstance(value, str | int | float):
            raise Unreadable(f"column {self.name!r}: {_short(value)} is not a category")
        word = text(value)
        known = word in self.categories
        numbers[self.categories.index(word) if known else len(self.categories)] = 1.0
        return numbers

    def knows(self, value: Any) -> bool:
        """Whether training had this category (a missing cell is not one)."""
        return value is None or text(value) in self.categories


Column = Numeric | Boolean | Date | Categorical


# -- Arrow columns as arrays


def text(value: str | int | float | bool) -> str:
    """The word for a category given in another type; what Arrow's cast to text writes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


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


def floats(column: Any, name: str) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """(rows,) float64 with NaN for what is missing, where it is missing, and the rows that cannot be read."""
    import pyarrow as pa

    column = combined(column)
    rejected: dict[int, str] = {}
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        values = np.full(len(column), np.nan)
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = _parsed(column, name, rejected)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    else:
        raise ValueError(f"column {name!r} holds {column.type}, not numbers")
    missing = np.isnan(values)
    for row in rejected:
        missing[row] = False
    return values, missing, rejected


def _parsed(column: Any, name: str, rejected: dict[int, str]) -> np.ndarray:
    """Text as numbers; whole columns in one go, and cell by cell only where that fails."""
    import pyarrow as pa

    pc = compute()

    column = pc.utf8_trim_whitespace(column)
    column = pc.if_else(pc.is_in(column, value_set=pa.array(NULLS, column.type)), None, column)
    try:
        return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        values = np.full(len(column), np.nan)
        for row, word in enumerate(column.to_pylist()):
            if word is None:
                continue
            try:
                values[row] = pa.scalar(word).cast(pa.float64()).as_py()
            except pa.ArrowInvalid:
                rejected[row] = f"column {name!r}: {_short(word)} is not a number"
        return values


_TRUE, _FALSE = ("true", "1", "yes", "t", "y"), ("false", "0", "no", "f", "n")


def booleans(column: Any, name: str) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """(rows,) 1, 0 or NaN for what is missing, where it is missing, and the rows that cannot be read."""
    import pyarrow as pa

    column = combined(column)
    if pa.types.is_boolean(column.type):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return values, np.isnan(values), {}
    rejected: dict[int, str] = {}
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = np.full(len(column), np.nan)
        for row, word in enumerate(column.to_pylist()):
            if word is None:
                continue
            if word.strip().lower() in _TRUE + _FALSE:
                values[row] = float(word.strip().lower() in _TRUE)
            else:
                rejected[row] = f"column {name!r}: {_short(word)} is neither true nor false"
    else:
        values, _, rejected = floats(column, name)
        for row in np.flatnonzero(~np.isnan(values) & (values != 0) & (values != 1)).tolist():
            rejected[row] = f"column {name!r}: {values[row]} is neither true nor false"
            values[row] = np.nan
    missing = np.isnan(values)
    for row in rejected:
        missing[row] = False
    return values, missing, rejected


def days(column: Any, name: str) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """(rows,) days since 1970-01-01, NaN for what is missing, where it is missing, and the rows that cannot be read."""
    import pyarrow as pa

    column = combined(column)
    rejected: dict[int, str] = {}
    if pa.types.is_date(column.type):
        values = column.cast(pa.date32()).cast(pa.int32()).cast(pa.float64()).to_numpy(zero_copy_only=False)
    elif pa.types.is_timestamp(column.type):
        micros = column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64()).cast(pa.float64(), False)
        values = micros.to_numpy(zero_copy_only=False) / 1e6 / DAY
    elif pa.types.is_string(column.type):
        values = np.full(len(column), np.nan)
        for row, word in enumerate(column.to_pylist()):
            if word is None:
                continue
            try:
                values[row] = _day(word, name)
            except Unreadable as error:
                rejected[row] = str(error)
    else:
        raise ValueError(f"column {name!r} holds {column.type}, not dates")
    missing = np.isnan(values)
    for row in rejected:
        missing[row] = False
    return values, missing, rejected


def _day(value: Any, name: str) -> float:
    try:
        when = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
        if isinstance(when, datetime.date) and not isinstance(when, datetime.datetime):
            when = datetime.datetime(when.year, when.month, when.day)
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.UTC)
        since = when - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    except (ValueError, AttributeError, TypeError) as error:
        raise Unreadable(f"column {name!r}: {_short(value)} is not a date (2026-11-22 or 2026-11-22T18:30)") from error
    return (since // datetime.timedelta(microseconds=1)) / 1e6 / DAY


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 40 else said[:37] + "..."
