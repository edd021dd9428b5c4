"""The kinds of input columns: what each remembers of the training rows, and how its cells become numbers.

A kind turns a whole Arrow column (`encode`) and a single Python value (`cell`) into the same float32 numbers, bit for
bit: both compute in float64 and round once (`vbdl.tabular.cells`).
"""

import datetime
import math
from dataclasses import dataclass, field
from typing import Any

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
from vbdl.tabular.reading import compute


@dataclass
class Block:
    """A column as numbers: (rows, width) float64, and what was met on the way."""

    values: np.ndarray
    rejected: dict[int, str] = field(default_factory=dict)  # row -> reason
    missing: int = 0
    unseen: int = 0  # categories that the training rows did not have


class _Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What all kinds share: a name, and the words that mean that a cell has no value."""

    name: str
    missing: tuple[str, ...] = MISSING

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
            raise Unreadable(f"column {self.name!r}: {short(value)} is not a number")
        try:
            return self._numbers(None if value is None else float(value))
        except OverflowError as error:
            raise Unreadable(f"column {self.name!r}: {short(value)} is not finite") from error


class Boolean(_Number, frozen=True, tag="boolean", forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """True and false, also as 1 and 0 or as text."""

    def encode(self, column: Any) -> Block:
        values, missing, rejected = booleans(column, self.name, self.missing)
        return self._scale(values, missing, rejected)

    def cell(self, value: Any) -> list[float]:
        value = plain(value)
        if self.is_missing(value):
            return self._numbers(None)
        if isinstance(value, str) and (bare := value.strip().lower()) in TRUE + FALSE:
            value = bare in TRUE
        if value is not None and value not in (0, 1):  # True == 1 and False == 0
            raise Unreadable(f"column {self.name!r}: {short(value)} is neither true nor false")
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
        return self._numbers(None if self.is_missing(value) else day(value, self.name, self.order))


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
            raise Unreadable(f"column {self.name!r}: {short(value)} is not a category")
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
        for form in (word, word.rstrip("0").removesuffix(".") if WHOLE.fullmatch(word) else f"{word}.0"):
            if form in self.categories:
                return self.categories.index(form)
        return -1


Column = Numeric | Boolean | Date | Categorical
