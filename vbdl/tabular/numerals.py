"""Parsing of numbers in text: 2,612.06 and 2.612,06, 1 234, 50%, € 12, (3.50), and marks for a missing number.

`recognize` finds the notation of a column; every cell of the column is then read in it, in training and prediction.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import msgspec

# marks for a missing number in a column of numbers, compared without case
MARKS = frozenset(
    "? - -- --- – — . .. ... * na n/a n.a. n.a n/d n.d. nd nan none null nil nat missing unknown unk blank k.a. \\n"
    " #n/a #na #value! #div/0! #ref! #num! #name? #null! (null) (blank) <na>".split()
) | {"not available", "not applicable", "not known", "keine angabe"}

_CURRENCIES = frozenset(
    "usd eur gbp jpy cny rmb inr chf cad aud nzd sek nok dkk pln czk huf brl mxn zar krw try rub sgd hkd ils thb kr "
    "kr. fr fr. sfr zł kč ft rs rs. r$ us$ c$ a$ hk$ s$ lei".split()
)
_SPACES = "\u0020\u00a0\u2009\u202f"
_THOUSANDS = {"": None, ",": ",", ".": r"\.", "'": "['\u2019]", " ": f"[{_SPACES}]"}
_STYLES = ((".", ""), (",", ""), (".", ","), (",", "."), (".", "'"), (",", "'"), (".", " "), (",", " "))
_LONGEST = 60  # largest number of characters of a number
_MOSTLY = 0.9  # fraction of numbers from which a column counts as numbers with some other cells


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The notation of numbers in a column.

    decimal: the decimal mark. thousands: the thousands separator, "" for none. unit: a percent sign or currency before
    or after the number, "" for none.
    """

    decimal: str = "."
    thousands: str = ""
    unit: str = ""

    def number(self, word: str) -> float | None:
        """Return the number of a cell, or None if the cell is not in this notation."""
        text = word.strip().replace("\u2212", "-")
        negative = text.startswith("(") and text.endswith(")")
        match = _pattern(self.decimal, self.thousands, self.unit).match(text[1:-1] if negative else text)
        if match is None:
            return None
        signs = [s for s in (match["before"], match["between"], match["behind"]) if s]
        if len(signs) + negative > 1:
            return None
        whole = re.sub(rf"[,.'\u2019{_SPACES}]", "", match["whole"] or "0")
        value = float(f"{whole}.{match['part'] or '0'}{match['power'] or ''}")
        return -value if negative or "-" in signs else value

    def __str__(self) -> str:
        decimal = f"{self.decimal!r} before decimals" if self.decimal != "." else ""
        thousands = f"{self.thousands!r} between thousands" if self.thousands else ""
        unit = f"{self.unit!r} left out" if self.unit else ""
        return ", ".join(s for s in (decimal, thousands, unit) if s) or "plain"


PLAIN = Written()


@lru_cache(maxsize=256)
def _pattern(decimal: str, thousands: str, unit: str) -> re.Pattern:
    mark = _THOUSANDS[thousands]
    # India groups two digits before the last three; a number with a thousands separator starts with no 0, unlike 0,126
    whole = r"\d+" if mark is None else rf"[1-9]\d{{0,2}}(?:{mark}\d{{2,3}})*{mark}\d{{3}}|\d+"
    sign = f"(?:{re.escape(unit)})?" if unit else ""
    space = f"[{_SPACES}]*"
    return re.compile(
        rf"(?P<before>[+-])?{space}{sign}{space}(?P<between>[+-])?(?=[\d{re.escape(decimal)}])"
        rf"(?P<whole>{whole})?(?:{re.escape(decimal)}(?P<part>\d*))?(?P<power>[eE][+-]?\d+)?"
        rf"{space}{sign}{space}(?P<behind>-)?$",
        re.IGNORECASE,
    )


@dataclass(frozen=True)
class Recognized:
    """A column of numbers: its notation, and those of its cells that are marks for a missing number."""

    written: Written
    missing: tuple[str, ...]
    example: tuple[str, float]  # a cell and its number


@dataclass(frozen=True)
class Mostly:
    """A column whose cells are mostly numbers: their share, and the other cells."""

    share: float
    others: tuple[str, ...]


class Ambiguous(ValueError):
    """Raised for cells that are different numbers in two notations."""


def recognize(
    counts: Mapping[str, int], column: str, decimal: str | None = None, thousands: str | None = None
) -> Recognized | Mostly | None:
    """Find the notation of numbers in cells, given as {cell: count}. Returns None if they are no numbers.

    decimal: the decimal mark of the user or of other columns, which is used if all cells allow it. thousands: the only
    thousands separator allowed. Raises Ambiguous if two notations are left that give different numbers, as for 1,234.
    """
    missing = marks(counts)
    rest = [w for w in counts if w not in set(missing)]
    numeric = [w for w in rest if len(w) <= _LONGEST and any(c.isdigit() for c in w)]
    if not rest or len(numeric) < len(rest) / 2:
        return None
    unit = _unit(numeric)
    if unit is None:
        return None
    styles = [
        Written(decimal=d, thousands=t, unit=unit)
        for d, t in _STYLES
        if thousands is None or (t in ("", thousands) and d != thousands)
    ]
    styles.sort(key=lambda s: s.decimal != (decimal or "."))
    fits = [s for s in styles if all(s.number(w) is not None for w in rest)]
    if not fits:
        return _mostly(counts, rest, styles)
    plain = next((s for s in fits if (s.decimal, s.thousands) == (".", "")), None)
    if decimal is not None and fits[0].decimal == decimal:
        fits = [s for s in fits if s.decimal == decimal]
    elif plain is not None:
        fits = [plain]
    for style in fits[1:]:
        for word in rest:
            one, other = fits[0].number(word), style.number(word)
            if one != other:
                raise Ambiguous(
                    f"column {column!r}: {word!r} is {one:.12g} ({_option(fits[0])}) or {other:.12g} "
                    f"({_option(style)}), and no other cell tells which: give one of the options"
                )
    shown = next((w for w in rest if not _bare(w)), rest[0])
    value = fits[0].number(shown)
    assert value is not None
    return Recognized(fits[0], missing, (shown, value))


_BESIDE = re.compile(rf"[+\-\u2212({_SPACES}]*(?P<before>[^\d+\-\u2212(){_SPACES}]*?)[+\-\u2212({_SPACES}]*[.,]?\d")
_BEHIND = re.compile(rf"(?<=[\d.,{_SPACES}])(?P<behind>[^\d.,+\-\u2212(){_SPACES}'\u2019][^\d,+\-\u2212()]*?)[)\-]*$")


def marks(words: Iterable[str]) -> tuple[str, ...]:
    """Return the words that are marks for a missing number or date."""
    return tuple(w for w in words if w.strip().casefold() in MARKS)


def _unit(words: list[str]) -> str | None:
    """Return the percent sign or currency beside the numbers, or "" if there is none.

    None if there are several units or other letters, or if only some of the cells are percentages.
    """
    units: set[str] = set()
    for word in words:
        before, behind = _BESIDE.match(word.strip()), _BEHIND.search(word.strip())
        unit = (before["before"] if before else "") or (behind["behind"] if behind else "")
        units.add(unit.casefold())
    signs = units - {""}
    if not signs:
        return ""
    sign = signs.pop()
    return None if signs or not _known(sign) or (sign in "%‰" and "" in units) else sign


def _known(unit: str) -> bool:
    return unit in _CURRENCIES or unit in ("%", "‰") or (len(unit) == 1 and unicodedata.category(unit) == "Sc")


def _mostly(counts: Mapping[str, int], words: list[str], styles: list[Written]) -> Mostly | None:
    total = sum(counts[w] for w in words)
    best = max(styles, key=lambda s: sum(counts[w] for w in words if s.number(w) is not None))
    others = tuple(w for w in words if best.number(w) is None)
    share = 1 - sum(counts[w] for w in others) / total
    return Mostly(share, others) if share >= _MOSTLY else None


def _option(style: Written) -> str:
    return f'--thousands "{style.thousands}"' if style.thousands else f'--decimal "{style.decimal}"'


def _bare(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def code_like(words: list[str]) -> bool:
    """Whether some of these words are codes, because they start with a zero, which numbers do not."""
    return any(re.fullmatch(r"0\d+", w.strip()) for w in words)
