"""Rows of CSV, Parquet and Arrow files, a chunk at a time."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vbdl.batch.sources import Chunk, file_state
from vbdl.tabular.reading import Reading, arrow, csv_options, format_of, read_options


def rechunked(batches: Iterator[Any], size: int, first: int) -> Iterator[tuple[int, Any]]:
    """(number, table) of `size` rows from record batches of any size; `first` is the number of the first."""
    pa = arrow()
    held, rows, number = [], 0, first
    for batch in batches:
        while len(batch):
            taken = batch.slice(0, size - rows)
            held.append(taken)
            rows += len(taken)
            batch = batch.slice(len(taken))
            if rows == size:
                yield number, pa.Table.from_batches(held)
                held, rows, number = [], 0, number + 1
    if rows:
        yield number, pa.Table.from_batches(held)


@dataclass
class TableFile:
    """A CSV, Parquet or Arrow file. columns: those to read, all unless given."""

    path: Path
    name: str
    columns: Sequence[str] | None = None
    numeric: Sequence[str] = ()  # columns of a CSV file that hold numbers
    text: Sequence[str] = ()  # and those that hold words, codes like 007 among them
    reading: Reading | None = None  # how a CSV file is read

    def state(self) -> dict[str, Any]:
        return file_state(self.path, self.name)

    def count(self) -> int | None:
        if format_of(self.path) != "parquet":
            return None
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(self.path).num_rows
        except arrow().ArrowException:
            return None  # said where it is read

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        pa = arrow()
        kind = format_of(self.path)
        read = {"parquet": self._parquet, "ipc": self._ipc, "csv": self._csv}.get(kind or "")
        if read is None:
            raise ValueError(f"{self.path} is not a table")
        try:
            yield from read(size, skip)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:  # what is damaged is either, by the place of the damage
            raise ValueError(f"{self.path} cannot be read as {kind}: {error}".strip()) from error

    def _simple(self, batches: Iterator[Any], size: int, first: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        for number, table in rechunked(batches, size, first):
            if not skip(number):
                start = number * size
                yield Chunk(number, np.arange(start, start + table.num_rows), table)

    def _check(self, names: Sequence[str]) -> list[str] | None:
        times = Counter(names)
        for column in names if self.columns is None else self.columns:
            if column not in times:
                raise ValueError(f"{self.path} has no column {column!r}; it has {list(names)}")
            if times[column] > 1:
                raise ValueError(f"{self.path} has two columns called {column!r}")
        return None if self.columns is None else list(self.columns)

    def _parquet(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        import pyarrow.parquet

        # buffered reading of pages: a row group of any size is never held whole
        with pyarrow.parquet.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = self._check(file.schema_arrow.names)
            first = _resume_at(size, skip)
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            group, begin = _first_needed(sizes, first * size)
            groups = list(range(group, file.num_row_groups))
            batches = file.iter_batches(min(size, 65_536), row_groups=groups, columns=columns, use_threads=False)
            yield from self._simple(_dropped(batches, begin), size, first, skip)

    def _ipc(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        pa = arrow()
        with pa.OSFile(str(self.path), "rb") as raw:
            stream = raw.read(6) != b"ARROW1"
            raw.seek(0)
            reader = pa.ipc.open_stream(raw) if stream else pa.ipc.open_file(raw)
            columns = self._check(reader.schema.names)
            batches = iter(reader) if stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
            chosen = (b.select(columns) if columns is not None else b for b in batches)
            yield from self._simple(chosen, size, 0, skip)

    def _csv(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        """Numbers as numbers; where a cell of them is none, the file again with every cell as text."""
        last = -1
        try:
            for chunk in self._csv_as(size, skip, self.numeric):
                yield chunk
                last = chunk.number
        except arrow().ArrowInvalid as error:
            if "conversion error" not in str(error).lower():
                raise
            yield from self._csv_as(size, lambda number: number <= last or skip(number), ())

    def _csv_as(self, size: int, skip: Callable[[int], bool], numeric: Sequence[str]) -> Iterator[Chunk]:
        pa = arrow()
        from pyarrow import csv

        bad: dict[int, str] = {}

        def invalid(row: Any) -> str:
            # `number` counts lines of the file from 1, the header among them
            bad[row.number - 2] = (
                f"the row has {row.actual_columns} cells, and there are {row.expected_columns} columns"
            )
            return "skip"

        types = {name: pa.float64() for name in numeric}
        types |= {name: pa.string() for name in (*self.text, *([] if numeric else self.numeric))}
        options = csv_options(self.path, types, self.reading)
        options["parse_options"].invalid_row_handler = invalid
        with csv.open_csv(self.path, read_options(self.reading, use_threads=False), **options) as header:
            columns = self._check(header.schema.names)
        bad.clear()
        options["convert_options"].include_columns = columns or []
        reader = csv.open_csv(self.path, read_options(self.reading, use_threads=False), **options)
        next_row, number = 0, 0
        held: list[Any] = []
        places: list[int] = []
        reported: set[int] = set()

        def cut(table: Any, rows: list[int]) -> Chunk:
            low, high = number * size, (number + 1) * size
            mine = sorted(r for r in bad if low <= r < high and r not in reported)
            reported.update(mine)
            return Chunk(number, np.array(rows, np.int64), table, [(r, bad[r]) for r in mine])

        for batch in _csv_batches(reader):
            rows = []
            while len(rows) < len(batch):  # good rows take the numbers that no bad one has
                if next_row not in bad:
                    rows.append(next_row)
                next_row += 1
            at = 0
            while at < len(rows):
                end = (number + 1) * size
                stop = int(np.searchsorted(rows, end))
                held.append(batch.slice(at, stop - at))
                places += rows[at:stop]
                at = stop
                if at < len(rows):  # the next row is of the next chunk
                    if not skip(number):
                        yield cut(pa.Table.from_batches(held), places)
                    held, places, number = [], [], number + 1
        final = max([*places[-1:], *(r for r in bad if r not in reported), -1])
        empty = reader.schema.empty_table()
        while number * size <= final:
            mine = pa.Table.from_batches([b for b in held if len(b)], reader.schema) if held else empty
            if not skip(number):
                yield cut(mine, places)
            held, places, number = [], [], number + 1


def _csv_batches(reader: Any) -> Iterator[Any]:
    while True:
        try:
            yield reader.read_next_batch()
        except StopIteration:
            return


def _resume_at(size: int, skip: Callable[[int], bool]) -> int:
    """The first chunk that is wanted (later ones may be done too)."""
    number = 0
    while skip(number):
        number += 1
    return number


def _first_needed(groups: list[int], row: int) -> tuple[int, int]:
    """The row group that holds this row, and which of its rows it is."""
    for number, rows in enumerate(groups):
        if row < rows:
            return number, row
        row -= rows
    return len(groups), 0


def _dropped(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    """The batches without their first rows."""
    for batch in batches:
        if rows >= len(batch):
            rows -= len(batch)
            continue
        yield batch.slice(rows)
        rows = 0
