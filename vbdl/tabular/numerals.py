"""Numbers as people write them: 2,612.06 and 2.612,06, 1 234, 50%, € 12, (3.50), with the marks for a missing one.

`recognize` says how the cells of a column are written; the column then reads every cell so, in training and prediction.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import msgspec

# a cell that is no number in a column of numbers, and means that there is none; compared without case
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
_LONGEST = 60  # characters of a number
_MOSTLY = 0.9  # of the cells are numbers: a column of numbers with other things in it


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How the cells of a column write numbers: the decimal mark, the mark between thousands, "" for none, and a sign
    of percent or a currency that may stand before or behind."""

    decimal: str = "."
    thousands: str = ""
    unit: str = ""

    def number(self, word: str) -> float | None:
        """The number of a cell, None where it is not written so."""
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
        said = f"{self.decimal!r} before decimals" if self.decimal != "." else ""
        marks = f"{self.thousands!r} between thousands" if self.thousands else ""
        unit = f"{self.unit!r} left out" if self.unit else ""
        return ", ".join(s for s in (said, marks, unit) if s) or "plain"


PLAIN = Written()


@lru_cache(maxsize=256)
def _pattern(decimal: str, thousands: str, unit: str) -> re.Pattern:
    mark = _THOUSANDS[thousands]
    # groups of two digits before the last one are written in India; no thousands begin with a zero, as 0,126 does
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
    """A column of numbers: how they are written, and which of its cells are marks for a missing one."""

    written: Written
    missing: tuple[str, ...]
    example: tuple[str, float]  # a cell, and its number


@dataclass(frozen=True)
class Mostly:
    """A column whose cells are numbers but for some."""

    share: float
    others: tuple[str, ...]


class Ambiguous(ValueError):
    """Cells that are other numbers in two ways of writing."""


def recognize(
    counts: Mapping[str, int], column: str, decimal: str | None = None, thousands: str | None = None
) -> Recognized | Mostly | None:
    """How these cells (and how often each is there) write numbers; None where they are no numbers.

    decimal: the mark that is given, or that other columns have: cells that it fits are read so. thousands: the only
    mark allowed. Ambiguous where two ways are left that read other numbers, as 1,234 has.
    """
    missing = marks(counts)
    rest = [w for w in counts if w not in set(missing)]
    numeric = [w for w in rest if len(w) <= _LONGEST and any(c.isdigit() for c in w)]
    if len(numeric) < len(rest) / 2:
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
    """The words that stand for a missing number or date."""
    return tuple(w for w in words if w.strip().casefold() in MARKS)


def _unit(words: list[str]) -> str | None:
    """The percent sign or currency that stands beside the numbers, "" for none; None where there are several or other
    letters, or where some cells are percents and others are not."""
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
    """Whether some of these digits are a code: a number is not written with a zero in front."""
    return any(re.fullmatch(r"0\d+", w.strip()) for w in words)
