"""The kinds of input columns: each stores statistics of the training rows and encodes cells as numbers.

A kind turns a whole Arrow column (`encode`) and a single Python value (`cell`) into the same float32 numbers, bit for
bit: both compute in float64 and round once (`vbdl.tabular.cells`).
"""

import datetime
import math
from dataclasses import dataclass, field

import msgspec
import numpy as np

from vbdl.tabular.cells import (
    FALSE,
    MISSING,
    TRUE,
    WHOLE,
    Unreadable,
    booleans,
    day,
    days,
    floats,
    plain,
    short,
    text,
    texts,
    without,
)
from vbdl.tabular.numerals import Written
from vbdl.tabular.reading import ArrowColumn, compute


@dataclass
class Block:
    """An encoded column: (rows, width) float64, the rows that were rejected, and counts of unusual cells."""

    values: np.ndarray
    rejected: dict[int, str] = field(default_factory=dict)  # row number -> reason
    missing: int = 0
    unseen: int = 0  # number of cells with categories that the training rows lack


class _Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The base of all kinds: a name, and the words for a missing cell."""

    name: str
    missing: tuple[str, ...] = MISSING

    def is_missing(self, value: object) -> bool:
        """Whether a cell is missing: None, NaN, an empty text or one of the words for it."""
        if isinstance(value, str):
            word = value.strip()
            return not word or word in self.missing
        return value is None or (isinstance(value, float) and math.isnan(value))


class _Number(_Column, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The base of all kinds of numbers. Values are standardized by the training rows' mean and std; a missing cell
    becomes their median, and sets an indicator if training had missing cells."""

    mean: float
    std: float
    fill: float  # value of a missing cell: the training rows' median
    indicator: bool  # whether a second number is 1 for a missing cell

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
    """A column of numbers, or of text that can be read as numbers.

    written: notation of the training cells if they were text, else None; rows may then give numbers as text too.
    """

    written: Written | None = None

    def encode(self, column: ArrowColumn) -> Block:
        values, missing, rejected = floats(column, self.name, self.missing, self.written)
        return self._scale(values, missing, rejected)

    def cell(self, value: object) -> list[float]:
        value = plain(value)
        if self.is_missing(value):
            return self._numbers(None)
        if isinstance(value, datetime.timedelta):
            value = value.total_seconds()
        if isinstance(value, str) and self.written is not None:
            number = self.written.number(value)
            value = value if number is None else number
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Unreadable(f"column {self.name!r}: {short(value)} is not a number")
        try:
            return self._numbers(None if value is None else float(value))
        except OverflowError as error:
            raise Unreadable(f"column {self.name!r}: {short(value)} is not finite") from error


class Boolean(_Number, frozen=True, tag="boolean", forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A column of truth values: true and false, 1 and 0, or text for them."""

    def encode(self, column: ArrowColumn) -> Block:
        values, missing, rejected = booleans(column, self.name, self.missing)
        return self._scale(values, missing, rejected)

    def cell(self, value: object) -> list[float]:
        value = plain(value)
        if self.is_missing(value):
            return self._numbers(None)
        if isinstance(value, str) and (bare := value.strip().lower()) in TRUE + FALSE:
            value = bare in TRUE
        if value is not None and value not in (0, 1):  # True == 1 and False == 0
            raise Unreadable(f"column {self.name!r}: {short(value)} is neither true nor false")
        return self._numbers(None if value is None else float(bool(value)))


class Date(_Number, frozen=True, tag="date", forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A column of dates or times, encoded as days since 1970-01-01; in UTC if they have a time zone.

    order: how text, and numbers such as 20260131, write dates, see `vbdl.tabular.dates`.
    """

    order: str = ""

    def encode(self, column: ArrowColumn) -> Block:
        values, missing, rejected = days(column, self.name, self.missing, self.order)
        return self._scale(values, missing, rejected)

    def cell(self, value: object) -> list[float]:
        value = plain(value)
        return self._numbers(None if self.is_missing(value) else day(value, self.name, self.order))


class Categorical(
    _Column, frozen=True, tag="categorical", forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """A column of categories, words or codes, encoded one-hot: 1 for the category of the row and 0 for the others.

    Categories that were rare or absent in training share the indicator `other`. A missing cell has its own indicator if
    training had missing cells, and is `other` if it had none.
    """

    categories: tuple[str, ...]
    indicator: bool

    @property
    def features(self) -> list[str]:
        known = [f"{self.name} = {c}" for c in self.categories]
        return [*known, f"{self.name} is another", *([f"{self.name} is missing"] if self.indicator else [])]

    def encode(self, column: ArrowColumn) -> Block:
        import pyarrow as pa

        pc = compute()

        try:
            words = without(texts(column), [w for w in self.missing if w not in self.categories])
        except pa.ArrowNotImplementedError as error:
            raise ValueError(f"column {self.name!r} holds {column.type}, not words or codes") from error
        missing = pc.is_null(words).to_numpy(zero_copy_only=False)
        # -1 for an unknown category
        places = pc.index_in(words, value_set=pa.array(self.categories, pa.string()))
        place = pc.fill_null(places, -1).to_numpy(zero_copy_only=False).astype(np.int64)
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

    def cell(self, value: object) -> list[float]:
        value = plain(value)
        numbers = [0.0] * (len(self.categories) + 1 + self.indicator)
        if self.is_missing(value):
            numbers[-1] = 1.0  # its own indicator if there is one, else `other`
            return numbers
        if not isinstance(value, str | int | float):
            raise Unreadable(f"column {self.name!r}: {short(value)} is not a category")
        place = self._place(text(value))
        numbers[len(self.categories) if place < 0 else place] = 1.0
        return numbers

    def is_missing(self, value: object) -> bool:
        return super().is_missing(value) and value not in self.categories

    def knows(self, value: object) -> bool:
        """Whether the training rows had this category; True for a missing cell."""
        return self.is_missing(value) or (isinstance(value, str | int | float) and self._place(text(value)) >= 0)

    def _place(self, word: str) -> int:
        """Return the number of a category, or -1 if training did not have it; 7 and 7.0 are one category."""
        for form in (word, word.rstrip("0").removesuffix(".") if WHOLE.fullmatch(word) else f"{word}.0"):
            if form in self.categories:
                return self.categories.index(form)
        return -1


Column = Numeric | Boolean | Date | Categorical
