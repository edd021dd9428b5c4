"""Inference of the kind of one column, and of the statistics that its encoding needs, from the training rows."""

import shlex
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from vbdl.tabular import dates
from vbdl.tabular.cells import booleans, combined, counted, days, decoded, floats, is_text, texts, without
from vbdl.tabular.columns import Boolean, Categorical, Column, Date, Numeric
from vbdl.tabular.numerals import PLAIN, Ambiguous, Mostly, Recognized, Written, code_like, marks, recognize
from vbdl.tabular.reading import Reading

if TYPE_CHECKING:
    import pyarrow

MAX_CATEGORIES = 64  # largest number of categories: the most frequent ones; all others are `other`
_MANY = 50  # rows; in fewer, counts of things may all differ
MIN_ROWS = 5  # smallest number of rows of a category with an indicator of its own


class _Statistics(TypedDict):
    """What the training rows say about a column of numbers: fields that `Numeric`, `Boolean` and `Date` share."""

    name: str
    missing: tuple[str, ...]
    mean: float
    std: float
    fill: float
    indicator: bool


class ColumnCells:
    """The cells of a column, from which its kind and its numbers are inferred.

    rows: the training rows. decimal: the decimal mark for cells that allow two. notes: receives notes about the column.
    """

    def __init__(
        self,
        name: str,
        column: "pyarrow.ChunkedArray",
        rows: np.ndarray,
        reading: Reading,
        decimal: str | None,
        notes: list[str],
    ):
        import pyarrow as pa

        self.name, self.rows, self.reading, self.decimal, self.notes = name, rows, reading, decimal, notes
        self.option = shlex.quote(name)  # the name as a shell takes it
        self.whole = combined(column)
        self.training = self.whole.take(pa.array(rows))
        self.missing = reading.missing
        self.written: Written | None = None
        self.order = ""

    def column(self, kind: str | None) -> Column | str:
        """The column's entry in the schema, or the reason why it is not an input."""
        import pyarrow as pa

        if pa.types.is_null(self.whole.type):
            return "it has no value in any row"
        mostly = None
        if kind in (None, "numeric") and is_text(self.whole.type if kind is None else decoded(self.whole).type):
            recognized = self._numbers(kind)
            mostly = recognized if isinstance(recognized, Mostly) else None
            kind = "numeric" if isinstance(recognized, Recognized) else kind
        kind = kind or _kind(self.name, self.whole)
        if kind == "categorical":
            entry = self._categorical(mostly)
        else:
            self._read_text(kind)
            entry = self._number(kind, mostly)
        self._note_missing()
        return entry

    def _numbers(self, kind: str | None) -> Recognized | Mostly | None:
        """Return the notation of numbers in the cells, or None if they are no numbers. Adds a note about it."""
        counts = counted(without(decoded(self.whole), self.missing))
        try:
            recognized = recognize(counts, self.name, self.decimal, self.reading.thousands)
        except Ambiguous as error:
            raise ValueError(f"{error}, or --categorical {self.option} or --ignore {self.option}") from error
        if not isinstance(recognized, Recognized):
            return recognized
        if kind is None and code_like(list(counts)):
            self.notes.append(
                f"column {self.name!r} has digits behind a zero: codes (--numeric {self.option}: numbers)"
            )
            return None
        self.written, self.missing = recognized.written, (*self.missing, *recognized.missing)
        word, number = recognized.example
        reading = f"{word!r} is {number:.12g}" if recognized.written != PLAIN else "as every cell is one"
        if recognized.missing:
            words = ", ".join(map(repr, recognized.missing))
            reading += f", {words} {'is' if len(recognized.missing) == 1 else 'are'} missing"
        self.notes.append(
            f"column {self.name!r} is text read as numbers, {reading} (--categorical {self.option}: words)"
        )
        return recognized

    def _read_text(self, kind: str) -> None:
        """Find the order of day and month in a column of dates, and the words for missing cells in one of dates or
        truth values."""
        import pyarrow as pa

        column = decoded(self.whole)
        text = is_text(column.type)
        if kind not in ("date", "boolean") or not (text or pa.types.is_integer(column.type)):
            return
        words = list(counted(without(texts(column), self.missing)))
        if missing := marks(words) if text else ():
            self.missing = (*self.missing, *missing)
            self.notes.append(f"column {self.name!r}: {', '.join(map(repr, missing))} is read as missing")
        if kind == "boolean":
            return
        if self.reading.date_format is not None:
            self.order = self.reading.date_format
            return
        try:  # cells that are no dates at all are reported when the cells are read
            self.order = dates.order_of([w for w in words if dates.readings(w.strip())], self.name)
        except dates.NoDate as error:
            raise ValueError(f"column {self.name!r}: {error}") from error
        if self.order:
            self.notes.append(f"column {self.name!r} is read as dates, {self.order.replace('-', ' ')} (--date-format)")

    def _number(self, kind: str, mostly: Mostly | None) -> Column | str:
        name, rows = self.name, self.rows
        if kind == "numeric" and self.reading.decimal == "," and self.written is None:
            self.written = Written(decimal=",")  # for files that are read later
        if kind == "date":
            values, missing, rejected = days(self.training, name, self.missing, self.order)
        elif kind == "boolean":
            values, missing, rejected = booleans(self.training, name, self.missing)
        else:
            values, missing, rejected = floats(self.training, name, self.missing, self.written)
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
        if kind == "numeric" and len(known) >= _MANY and _is_numbering(known):
            self.notes.append(
                f"column {name!r} has another whole number in every training row: is it an id? "
                f"(--ignore {self.option} leaves it out)"
            )
        statistics: _Statistics = {
            "name": name,
            "missing": self.missing,
            "mean": float(known.mean()),
            "std": spread or 1.0,
            "fill": float(np.median(known)),
            "indicator": bool(missing.any()),
        }
        if kind == "date":
            return Date(**statistics, order=self.order)
        if kind == "boolean":
            return Boolean(**statistics)
        return Numeric(**statistics, written=self.written)

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
            hint = f"; its cells are dates (--date {self.option}, or, in vbdl fit, --time {self.option})"
        if not often or (len(seen) > 20 and len(seen) > rows / 2):
            different = f"it has {len(seen)} different values in {rows} training rows"
            return f"{different}: an id or free text, not categories{hint}"
        if len(seen) == 1 and words.null_count == 0:
            return f"it is {often[0]!r} in every training row"
        if mostly is not None:
            self.notes.append(f"column {self.name!r} is read as categories{hint}")
        known = tuple(sorted(often[:MAX_CATEGORIES]))
        return Categorical(name=self.name, categories=known, indicator=words.null_count > 0, missing=self.missing)

    def _note_missing(self) -> None:
        """Add a note about the words, in memory or in Parquet, that are read as missing cells."""
        column = decoded(self.whole)
        if not is_text(column.type):
            return
        counts = {w: n for w, n in counted(column).items() if w.strip() in self.reading.missing and w.strip()}
        if counts:
            words = ", ".join(f"{n} times {w!r}" for w, n in counts.items())
            self.notes.append(f"column {self.name!r}: {words} is read as missing (--missing says which words are)")


def _options(mostly: Mostly) -> str:
    """The cells that are no numbers, with the options that can make them numbers, as part of a sentence."""
    shown = ", ".join(map(repr, mostly.others[:3])) + (", ..." if len(mostly.others) > 3 else "")
    return f"{shown} are not: --missing, --thousands and --decimal say what they are"


def _is_numbering(values: np.ndarray) -> bool:
    """Whether values are whole numbers, no two the same."""
    return bool((values == np.floor(values)).all()) and len(np.unique(values)) == len(values)


def _dated(words: list[str]) -> bool:
    """Whether these words can be read as dates."""
    try:
        dates.order_of(words, "")
    except dates.NoDate:
        return False
    except ValueError:
        return True
    return True


def _kind(name: str, column: "pyarrow.Array") -> str:
    import pyarrow as pa

    option = shlex.quote(name)
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
            f"{option}), read it as days since 1970 (--date {option}), or, in vbdl fit, split by it (--time {option})"
        )
    raise ValueError(f"column {name!r} holds {kind}, which is no kind of input: leave it out (--ignore {option})")
