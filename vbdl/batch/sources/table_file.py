"""Reading of table files a chunk at a time: Parquet and Arrow here, CSV in `csv_file`."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vbdl.batch.sources.csv_file import CsvFile
from vbdl.batch.sources.source import Chunk, JsonValue, Source, file_state, file_version, one_line
from vbdl.tabular.reading import Reading, arrow, format_of

if TYPE_CHECKING:
    import pyarrow


def rechunked(batches: "Iterator[pyarrow.RecordBatch]", size: int, first: int) -> "Iterator[tuple[int, pyarrow.Table]]":
    """Yield (number, table) of `size` rows from record batches of any size; `first` is the first number."""
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
class TableFile(Source):
    """A CSV, Parquet or Arrow file. columns: the columns to read; all unless given."""

    path: Path
    name: str
    columns: Sequence[str] | None = None
    numeric: Sequence[str] = ()  # columns of a CSV file with numbers
    text: Sequence[str] = ()  # columns with words, including codes like 007
    verbatim: Sequence[str] = ()  # columns whose cells are copied unchanged, `NA` and empty ones too
    reading: Reading | None = None  # options for reading a CSV file

    @property
    def is_csv(self) -> bool:
        return format_of(self.path) == "csv"

    def state(self) -> dict[str, JsonValue]:
        return file_state(self.path, self.name)

    def version(self) -> tuple[int, ...] | None:
        return file_version(self.path)

    def count(self) -> int | None:
        if format_of(self.path) != "parquet":
            return None
        import pyarrow.parquet

        try:
            with self._open() as file:
                return pyarrow.parquet.read_metadata(file).num_rows
        except (arrow().ArrowException, OSError):
            return None  # reported when the file is read

    def types(self, every: bool = False) -> "dict[str, pyarrow.DataType] | None":
        """Return the Arrow types of the columns that are read, or of all columns if `every`.

        None if the file cannot be read; reading its rows raises the reason.
        """
        pa = arrow()
        if self.is_csv and not every:
            known = dict.fromkeys((*self.text, *self.verbatim), pa.string())
            return {**known, **dict.fromkeys(self.numeric, pa.float64())}
        try:
            return dict(zip(*self._schema(), strict=True))
        except Exception:
            return None

    def _schema(self) -> "tuple[list[str], list[pyarrow.DataType]]":
        pa = arrow()
        kind = format_of(self.path)
        if kind == "csv":
            header = self._csv().header()
            return header.names, header.types
        with self._open() as file:
            if kind == "parquet":
                import pyarrow.parquet

                schema = pyarrow.parquet.ParquetFile(file).schema_arrow
            else:
                schema = (pa.ipc.open_stream(file) if _is_stream(file) else pa.ipc.open_file(file)).schema
            return schema.names, schema.types

    def _csv(self) -> CsvFile:
        return CsvFile(self.path, self.columns, self.numeric, self.text, self.verbatim, self.reading, self._check)

    def _open(self) -> "pyarrow.OSFile":
        """Open the file for reading by Arrow, even if its name is not UTF-8."""
        return arrow().OSFile(os.fsencode(self.path), "rb")

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        kind = format_of(self.path)
        if kind not in ("parquet", "ipc", "csv"):
            raise ValueError(f"{self.path} is not a table")
        read = {"parquet": self._parquet, "ipc": self._ipc, "csv": self._csv().chunks}[kind]
        try:
            yield from read(size, skip)
        except FileNotFoundError:
            raise
        except Exception as error:  # damaged files raise errors of many kinds
            known = isinstance(error, ValueError) and not isinstance(error, arrow().ArrowException)
            if known and str(self.path) in str(error):
                raise
            raise ValueError(f"{self.path} cannot be read as {kind}: {one_line(error)}") from error

    def _simple(
        self,
        batches: "Iterator[pyarrow.RecordBatch]",
        schema: "pyarrow.Schema",
        size: int,
        first: int,
        skip: Callable[[int], bool],
    ) -> Iterator[Chunk]:
        """Yield chunks of `size` rows from batches. schema: that of the file, for a file without batches."""
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

        # pages are read buffered, so a large row group is never whole in memory
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


def _selected(schema: "pyarrow.Schema", columns: Sequence[str] | None) -> "pyarrow.Schema":
    return schema if columns is None else arrow().schema([schema.field(name) for name in columns])


def _is_stream(raw: "pyarrow.OSFile") -> bool:
    """Whether an Arrow file has the stream format, without a footer that lists its batches."""
    is_stream = raw.read(6) != b"ARROW1"
    raw.seek(0)
    return is_stream


def _validated(
    batches: "Iterator[pyarrow.RecordBatch]", columns: Sequence[str] | None
) -> "Iterator[pyarrow.RecordBatch]":
    """Yield the batches after checking their offsets, which in a damaged file may point anywhere in memory."""
    for batch in batches:
        chosen = batch if columns is None else batch.select(list(columns))
        chosen.validate(full=True)
        yield chosen


def _resume_at(size: int, skip: Callable[[int], bool]) -> int:
    """Return the number of the first chunk that is not skipped."""
    number = 0
    while skip(number):
        number += 1
    return number


def _first_needed(groups: list[int], row: int) -> tuple[int, int]:
    """Return (row group that holds this row, number of the row in it)."""
    for number, rows in enumerate(groups):
        if row < rows:
            return number, row
        row -= rows
    return len(groups), 0


def _dropped(batches: "Iterator[pyarrow.RecordBatch]", rows: int) -> "Iterator[pyarrow.RecordBatch]":
    """Yield the batches without their first `rows` rows."""
    for batch in batches:
        if rows >= len(batch):
            rows -= len(batch)
            continue
        yield batch.slice(rows)
        rows = 0
