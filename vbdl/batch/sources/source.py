"""The base class of sources of rows, which a batch job reads a chunk at a time, and what several sources need.

A source divides its rows into chunks of a given size, numbered from 0, however its file is stored. Finished chunks are
skipped, without reading them if the format allows that. A source without rows gives one chunk without rows, which knows
the columns. Rows keep their number in the file, without the header, even if rows before them cannot be read.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from vbdl.types import Inputs

if TYPE_CHECKING:
    import pyarrow

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
"""A value as JSON holds it."""


@dataclass
class Chunk:
    """Consecutive rows of a source."""

    number: int
    rows: np.ndarray  # (n,) int64 row numbers in the source
    data: "pyarrow.Table | Inputs"  # the same n rows
    rejected: list[tuple[int, str]] = field(default_factory=list)  # (row number, reason) of rows that are not in data


@runtime_checkable
class Source(Protocol):
    """One file, table or data set: the base class of all sources."""

    name: str

    def state(self) -> dict[str, JsonValue]:
        """Return JSON that changes when the source changes, and is equal for a copy of a file with the same times."""
        ...

    def version(self) -> object:
        """Return a value that changes when the source is written to or replaced; compared before and after reading.

        The default is `state()`; override it if the source can change while it is read.
        """
        return self.state()

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        """Yield chunks of `size` rows, except those for which `skip(number)` is true.

        Raises ValueError that names the place where the source cannot be read.
        """
        ...

    def count(self) -> int | None:
        """Return the number of rows, or None if it is unknown before reading."""
        ...


def file_version(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes when a file is written to, replaced, or given other times or permissions; None if
    there is no file."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def file_state(path: Path, name: str) -> dict[str, JsonValue]:
    """Return the state of a source that is one file: its name, size and time of change."""
    about = os.stat(path)
    return {"name": name, "bytes": about.st_size, "modified": about.st_mtime_ns}


def printable(text: str) -> str:
    """Return the text with bytes of file names that are not UTF-8 written like %E9."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
