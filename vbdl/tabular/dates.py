"""Parsing of dates in text: ISO, day first, month first, month names, compact digits, with times and time zones.

A date such as 03/04/2024 has two readings. `order_of` finds the order that all cells of a column allow, and raises if
two orders are left. `instant` reads one cell in that order.
"""

import datetime
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

ORDERS = ("day-first", "month-first", "year-first")
_MICROSECOND = datetime.timedelta(microseconds=1)
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

# in English, German, French, Spanish, Italian, Portuguese and Dutch; no name belongs to two months
_NAMES = (
    "january jan januar janvier janv enero ene gennaio gen janeiro januari jänner jän",
    "february feb februar février fevrier févr fevr fév febrero febbraio fevereiro fev februari",
    "march mar märz maerz mär mrz mars marzo março marco maart mrt",
    "april apr avril avr abril abr aprile",
    "may mai mayo maggio mag maio mei",
    "june jun juni juin junio giugno giu junho",
    "july jul juli juillet juil julio luglio lug julho",
    "august aug août aout agosto ago augustus",
    "september sep sept septembre septiembre settembre set setembro",
    "october oct oktober okt octobre octubre ottobre ott outubro out",
    "november nov novembre noviembre novembro",
    "december dec dezember dez décembre decembre déc diciembre dic dicembre dezembro",
)
MONTHS = {name: number for number, names in enumerate(_NAMES, 1) for name in names.split()}
_SPOKEN = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip

_TIME = re.compile(
    r"(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<part>\d{1,9}))?)?"
    r"\s*(?P<half>[ap]\.?m\.?)?(?:\s*uhr)?\s*(?P<zone>z|utc|gmt|[+-]\d{2}(?::?\d{2})?)?$",
    re.IGNORECASE,
)
_YEAR_FIRST = re.compile(r"(\d{4})\s*[-/._年]\s*(\d{1,2})\s*[-/._月]\s*(\d{1,2})\s*[.日]?$")
_YEAR_LAST = re.compile(r"(\d{1,2})\s*([-/._ ])\s*(\d{1,2})\s*\2\s*(\d{4}|\d{2})\.?$")
_COMPACT = re.compile(r"(\d{4})(\d{2})(\d{2})$")
_COMPACT_TIME = re.compile(r"(\d{8})[T ]?(\d{2})(\d{2})(\d{2})?(?:\.(\d+))?(Z?)$", re.IGNORECASE)
_MONTH = re.compile(r"(?:(?P<y>\d{4})[-/.](?P<m>\d{1,2})|(?P<m2>\d{1,2})[-/.](?P<y2>\d{4}))$")
_QUARTER = re.compile(r"(?:(?P<y>\d{4})[-/ ]?q(?P<q>[1-4])|q(?P<q2>[1-4])[-/ ]?(?P<y2>\d{4}))$", re.IGNORECASE)
_WORDS = re.compile(r"[^\W\d_]+")


class NoDate(ValueError):
    """Raised for a cell that is no date, with the reason."""


def instant(word: str, order: str = "") -> datetime.datetime:
    """Parse one cell as an instant, in UTC if it names no time zone. Raises NoDate with the reason.

    order: "" for cells with only one reading, "day-first", "month-first", "year-first", or a format of `strptime`.
    """
    text = word.strip()
    if "%" in order:
        try:
            when = datetime.datetime.strptime(text, order)
            return when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
        except ValueError as error:
            if "" not in readings(text):  # ISO dates, which requests to the service have, are read with any order
                raise NoDate(f"{word!r} is not a date written as {order}") from error
    by_order = readings(text)
    if not by_order:
        raise NoDate(f"{word!r} is not a date (2026-11-22 or 2026-11-22T18:30)")
    if "" in by_order:
        return by_order[""]
    if order in by_order:
        return by_order[order]
    if order:
        raise NoDate(f"{word!r} is not a date written {order.replace('-', ' ')}")
    raise NoDate(f"{word!r} is not written as the dates of training are, and may be {_either(by_order)}")


def micros(when: datetime.datetime) -> int:
    """The number of microseconds since 1970-01-01 UTC."""
    return (when - _EPOCH) // _MICROSECOND


def check_order(order: str) -> str:
    """Return the order. Raises ValueError if it is neither one of ORDERS nor a format of strptime."""
    if order in ORDERS or "%" in order:
        return order
    raise ValueError(f"a date format is {', '.join(ORDERS)} or like %d/%m/%Y, got {order!r}")


def order_of(words: Iterable[str], column: str) -> str:
    """Return the order in which all these cells can be read, or "" if every cell has only one reading.

    Raises NoDate if a cell is no date in any order, and ValueError if two orders are left that mean different days.
    """
    left: set[str] | None = None
    first: tuple[str, Mapping[str, datetime.datetime]] | None = None
    apart: list[tuple[str, Mapping[str, datetime.datetime]]] = []
    for word in words:
        by_order = readings(word.strip())
        if not by_order:
            raise NoDate(f"{word!r} is not a date")
        if "" in by_order:
            continue
        first = first or (word, by_order)
        left = set(by_order) if left is None else left & set(by_order)
        if not left:
            raise NoDate(f"{word!r} and {first[0]!r} are not dates of one order")
        if len(set(by_order.values())) > 1:
            apart.append((word, by_order))
    if left is None:
        return ""
    # a year of two digits in front is rare: it is used only if no other order is possible
    likely = left - {"year-first"} or left
    if len(likely) > 1:
        word, by_order = next(((w, f) for w, f in apart if len({f[o] for o in likely}) > 1), first or ("", {}))
        raise ValueError(
            f"column {column!r}: {word!r} is {_either({o: by_order[o] for o in ORDERS if o in likely})}: "
            f"--date-format says which"
        )
    return likely.pop()


def _either(by_order: Mapping[str, datetime.datetime]) -> str:
    """The readings of a cell in words: 3 April 2024 (day-first) or 4 March 2024 (month-first)."""
    return " or ".join(f"{day.day} {_SPOKEN[day.month - 1]} {day.year} ({order})" for order, day in by_order.items())


@lru_cache(maxsize=65_536)
def readings(text: str) -> Mapping[str, datetime.datetime]:
    """Return {order: instant} for each reading of a cell: {"": instant} if there is only one, {} if there is none."""
    if text[4:5] in ("-", "W") and text[:4].isdigit():
        try:
            by_order = datetime.datetime.fromisoformat(text)
            return {"": by_order if by_order.tzinfo else by_order.replace(tzinfo=datetime.UTC)}
        except ValueError:
            pass
    if compact := _compact(text):
        return {"": compact}
    for without_day in (text, _without_weekday(text)):
        if without_day is None:
            break
        date, clock = _cut(without_day)
        if clock is None:
            continue
        by_order = _dates(date)
        if by_order:
            return {o: day + clock for o, day in by_order.items()}
    return {}


def _compact(text: str) -> datetime.datetime | None:
    if not text[:8].isdigit() or len(text) < 8:
        return None
    clock = datetime.timedelta()
    day = text
    if match := _COMPACT_TIME.match(text):
        day, hour, minute, second, part, _ = match.groups()
        if int(hour) > 23 or int(minute) > 59 or int(second or 0) > 59:
            return None
        clock = datetime.timedelta(hours=int(hour), minutes=int(minute), seconds=float(f"{second or 0}.{part or 0}"))
    if not (match := _COMPACT.match(day)) or not 1800 <= int(match[1]) < 2200:
        return None
    midnight = _day(int(match[1]), int(match[2]), int(match[3]))
    return None if midnight is None else midnight + clock


def _cut(text: str) -> tuple[str, datetime.timedelta | None]:
    """Split text into the day and the time of day: zero without a time, None if the rest is no time."""
    at = text.find(":")
    if at < 0:
        return text, datetime.timedelta()
    start = at
    while start > 0 and text[start - 1].isdigit():
        start -= 1
    # Wed Jan 31 18:30:00 2024, the format of C and many servers
    clock, year = text[start:], ""
    if ended := re.search(r"\s(\d{4})$", clock):
        clock, year = clock[: ended.start()], f" {ended[1]}"
    match = _TIME.match(clock.strip())
    if match is None or start == 0:
        return text, None
    hour, minute, second = int(match["hour"]), int(match["minute"]), int(match["second"] or 0)
    half = (match["half"] or "").replace(".", "").lower()
    if half:
        if not 1 <= hour <= 12:
            return text, None
        hour = hour % 12 + (12 if half == "pm" else 0)
    if hour > 23 or minute > 59 or second > 59:
        return text, None
    zone = (match["zone"] or "").lower()
    offset = datetime.timedelta()
    if zone[:1] in ("+", "-"):
        digits = zone[1:].replace(":", "").ljust(4, "0")
        offset = datetime.timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
        offset = -offset if zone[0] == "-" else offset
    micro = int((match["part"] or "").ljust(6, "0")[:6] or 0)
    length = datetime.timedelta(hours=hour, minutes=minute, seconds=second, microseconds=micro)
    return text[:start].rstrip(" T,t") + year, length - offset


def _dates(text: str) -> dict[str, datetime.datetime]:
    text = text.strip()
    if match := _YEAR_FIRST.match(text):
        return _one(int(match[1]), int(match[2]), int(match[3]))
    if match := _YEAR_LAST.match(text):
        a, b, year = int(match[1]), int(match[3]), match[4]
        full = int(year) if len(year) == 4 else _century(int(year))
        by_order = {"day-first": _day(full, b, a), "month-first": _day(full, a, b)}
        if len(year) == 2 and len(match[1]) == 2:
            by_order["year-first"] = _day(_century(a), b, int(year))
        return {o: when for o, when in by_order.items() if when is not None}
    if match := _MONTH.match(text):
        return _one(int(match["y"] or match["y2"]), int(match["m"] or match["m2"]), 1)
    if match := _QUARTER.match(text):
        return _one(int(match["y"] or match["y2"]), 3 * int(match["q"] or match["q2"]) - 2, 1)
    return _named(text)


def _named(text: str) -> dict[str, datetime.datetime]:
    """Parse a date with the name of its month: 31 Jan 2024, January 31st, 2024, 31-Jan-24, 1er janvier 2024."""
    words = [w for w in _WORDS.findall(text.casefold()) if w not in ("de", "del", "of", "st", "nd", "rd", "th", "er")]
    if len(words) != 1 or words[0] not in MONTHS:
        return {}
    month, numbers = MONTHS[words[0]], re.findall(r"\d+", text)
    long = [n for n in numbers if len(n) == 4]
    if len(numbers) == 1 and long:
        return _one(int(long[0]), month, 1)
    if len(numbers) != 2 or any(len(n) > 2 for n in numbers if n not in long):
        return {}
    if len(long) == 1:
        return _one(int(long[0]), month, int(next(n for n in numbers if n != long[0])))
    if not long and re.match(r"\d", text):  # 31-Jan-24; a year of two digits comes last
        return _one(_century(int(numbers[1])), month, int(numbers[0]))
    return {}


def _without_weekday(text: str) -> str | None:
    """Return the text after a first word that may be a day of the week, or None if there is no such word."""
    match = re.match(r"[^\W\d_]{2,12}\.?,?\s+(?=.*\d)", text)
    return text[match.end() :] if match else None


def _century(year: int) -> int:
    return year + (1900 if year >= 69 else 2000)  # the rule of POSIX


def _day(year: int, month: int, day: int) -> datetime.datetime | None:
    try:
        return datetime.datetime(year, month, day, tzinfo=datetime.UTC)
    except ValueError:
        return None


def _one(year: int, month: int, day: int) -> dict[str, datetime.datetime]:
    when = _day(year, month, day)
    return {} if when is None else {"": when}
