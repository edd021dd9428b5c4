"""Rows of CSV, Parquet and Arrow files, a chunk at a time."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vbdl.batch.sources import Chunk, file_state, file_version, one_line
from vbdl.tabular.reading import Reading, arrow, compute, csv_options, format_of, read_options


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
    text: Sequence[str] = ()  # those that hold words, codes like 007 among them
    verbatim: Sequence[str] = ()  # and those whose cells are carried over as they stand, `NA` and empty ones too
    reading: Reading | None = None  # how a CSV file is read

    @property
    def is_csv(self) -> bool:
        return format_of(self.path) == "csv"

    def state(self) -> dict[str, Any]:
        return file_state(self.path, self.name)

    def version(self) -> Any:
        return file_version(self.path)

    def count(self) -> int | None:
        if format_of(self.path) != "parquet":
            return None
        import pyarrow.parquet

        try:
            with self._open() as file:
                return pyarrow.parquet.read_metadata(file).num_rows
        except (arrow().ArrowException, OSError):
            return None  # said where it is read

    def types(self, every: bool = False) -> dict[str, Any] | None:
        """Arrow types of the columns as they are read, or, every, of all in the file; None where it cannot be read,
        which is said where it is."""
        pa = arrow()
        if self.is_csv and not every:
            known = dict.fromkeys((*self.text, *self.verbatim), pa.string())
            return {**known, **dict.fromkeys(self.numeric, pa.float64())}
        try:
            return dict(zip(*self._schema(), strict=True))
        except Exception:
            return None

    def _schema(self) -> tuple[list[str], list[Any]]:
        pa = arrow()
        kind = format_of(self.path)
        if kind == "csv":
            with self._csv_reader(self._csv_options({})) as reader:
                return reader.schema.names, reader.schema.types
        with self._open() as file:
            if kind == "parquet":
                import pyarrow.parquet

                schema = pyarrow.parquet.ParquetFile(file).schema_arrow
            else:
                schema = (pa.ipc.open_stream(file) if _is_stream(file) else pa.ipc.open_file(file)).schema
            return schema.names, schema.types

    def _open(self) -> Any:
        """The file for Arrow, whatever bytes its name is of."""
        return arrow().OSFile(os.fsencode(self.path), "rb")

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        kind = format_of(self.path)
        read = {"parquet": self._parquet, "ipc": self._ipc, "csv": self._csv}.get(kind or "")
        if read is None:
            raise ValueError(f"{self.path} is not a table")
        try:
            yield from read(size, skip)
        except FileNotFoundError:
            raise
        except Exception as error:  # what is damaged fails in many ways, by the place of the damage
            known = isinstance(error, ValueError) and not isinstance(error, arrow().ArrowException)
            if known and str(self.path) in str(error):
                raise
            raise ValueError(f"{self.path} cannot be read as {kind}: {one_line(error)}") from error

    def _simple(
        self, batches: Iterator[Any], schema: Any, size: int, first: int, skip: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        """schema: of the batches, for a file without any."""
        empty = first == 0
        for number, table in rechunked(batches, size, first):
            empty = False
            if not skip(number):
                start = number * size
                yield Chunk(number, np.arange(start, start + table.num_rows), table)
        if empty and not skip(0):
            yield Chunk(0, np.arange(0), schema.empty_table())

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
        with self._open() as raw, pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = self._check(file.schema_arrow.names)
            schema = _selected(file.schema_arrow, columns)
            first = _resume_at(size, skip)
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            group, begin = _first_needed(sizes, first * size)
            groups = list(range(group, file.num_row_groups))
            batches = file.iter_batches(min(size, 65_536), row_groups=groups, columns=columns, use_threads=False)
            yield from self._simple(_dropped(batches, begin), schema, size, first, skip)

    def _ipc(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        pa = arrow()
        with self._open() as raw:
            stream = _is_stream(raw)
            reader = pa.ipc.open_stream(raw) if stream else pa.ipc.open_file(raw)
            columns = self._check(reader.schema.names)
            schema = _selected(reader.schema, columns)
            batches = iter(reader) if stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield from self._simple(_validated(batches, columns), schema, size, 0, skip)

    def _csv(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        """Numbers as numbers; where a cell is not of the type that its column had until then, the file again with every
        cell as text."""
        last = -1
        try:
            for chunk in self._csv_as(size, skip, text=False):
                yield chunk
                last = chunk.number
        except arrow().ArrowInvalid as error:
            if "conversion error" not in str(error).lower():
                raise
            yield from self._csv_as(size, lambda number: number <= last or skip(number), text=True)

    def _csv_options(self, types: Mapping[str, Any]) -> dict[str, Any]:
        options = csv_options(self.path, types, self.reading)
        # done here for each column, because the cells of some stay as they are
        options["convert_options"].strings_can_be_null = False
        options["parse_options"].invalid_row_handler = lambda row: "skip"
        return options

    def _csv_reader(self, options: Mapping[str, Any]) -> Any:
        from pyarrow import csv

        raw = self._open()
        if self.path.name.lower().endswith(".gz"):
            raw = arrow().CompressedInputStream(raw, "gzip")
        return csv.open_csv(raw, read_options(self.reading, use_threads=False), **options)

    def _csv_types(self, text: bool) -> dict[str, Any]:
        """The types that are not left to the first rows."""
        pa = arrow()
        words = dict.fromkeys((*self.text, *self.verbatim), pa.string())
        types = {**dict.fromkeys(self.numeric, pa.float64()), **words}
        with self._csv_reader(self._csv_options({})) as header:
            names = header.schema.names
            self._check(names)
            undecided = [f.name for f in header.schema if text or pa.types.is_null(f.type)]
        if not text:
            undecided = [name for name in undecided if name not in types]
        wanted = names if self.columns is None else self.columns
        return {**types, **{name: pa.string() for name in undecided if name in wanted}}

    def _csv_as(self, size: int, skip: Callable[[int], bool], text: bool) -> Iterator[Chunk]:
        pa = arrow()
        bad: dict[int, str] = {}

        def invalid(row: Any) -> str:
            # `number` counts lines of the file from 1, the header among them
            bad[row.number - 2] = (
                f"the row has {row.actual_columns} cells, and there are {row.expected_columns} columns"
            )
            return "skip"

        options = self._csv_options(self._csv_types(text))
        options["parse_options"].invalid_row_handler = invalid
        options["convert_options"].include_columns = list(self.columns or [])
        reader = self._csv_reader(options)
        nulls = pa.array(options["convert_options"].null_values, pa.string())
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
            batch = _without_words_for_missing(batch, nulls, self.verbatim)
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
        final = max([*places[-1:], *(r for r in bad if r not in reported), 0])  # a file without rows is a chunk too
        empty = reader.schema.empty_table()
        while number * size <= final:
            mine = pa.Table.from_batches([b for b in held if len(b)], reader.schema) if held else empty
            if not skip(number):
                yield cut(mine, places)
            held, places, number = [], [], number + 1


def _selected(schema: Any, columns: Sequence[str] | None) -> Any:
    return schema if columns is None else arrow().schema([schema.field(name) for name in columns])


def _is_stream(raw: Any) -> bool:
    """Whether an Arrow file is a stream of batches, without a table of contents."""
    found = raw.read(6) != b"ARROW1"
    raw.seek(0)
    return found


def _validated(batches: Iterator[Any], columns: Sequence[str] | None) -> Iterator[Any]:
    """Batches whose cells lie where they are said to lie: in a damaged file they may lie in anybody's memory."""
    for batch in batches:
        chosen = batch if columns is None else batch.select(list(columns))
        chosen.validate(full=True)
        yield chosen


def _without_words_for_missing(batch: Any, nulls: Any, verbatim: Sequence[str]) -> Any:
    """Null for `NA` and its like in columns of text."""
    pa, pc = arrow(), compute()
    columns = [
        pc.if_else(pc.is_in(column, value_set=nulls), None, column)
        if pa.types.is_string(field.type) and field.name not in verbatim
        else column
        for field, column in zip(batch.schema, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


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
