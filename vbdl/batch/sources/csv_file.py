"""Reading of CSV files a chunk at a time; a row keeps its number even if rows before it cannot be read."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vbdl.batch.sources.source import Chunk
from vbdl.tabular.reading import CsvOptions, Reading, arrow, compute, csv_options, read_options

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.csv


@dataclass
class CsvFile:
    """The cells of a CSV file. The fields are those of `vbdl.batch.sources.TableFile`.

    check_columns: a function of the file's columns that raises ValueError if they are not the wanted ones.
    """

    path: Path
    columns: Sequence[str] | None
    numeric: Sequence[str]
    text: Sequence[str]
    verbatim: Sequence[str]
    reading: Reading | None
    check_columns: Callable[[Sequence[str]], object]

    def header(self) -> "pyarrow.Schema":
        """Return the names of the columns and the types inferred from the first rows."""
        with self._open(self._options({})) as reader:
            return reader.schema

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        """Yield the chunks of the file, with numbers as numbers.

        If a cell does not have the type that the first rows suggest, the rest of the file is read as text.
        """
        last = -1
        try:
            for chunk in self._chunks_as(size, skip, text=False):
                yield chunk
                last = chunk.number
        except arrow().ArrowInvalid as error:
            if "conversion error" not in str(error).lower():
                raise
        else:
            return
        # outside the except, or errors of the rest would begin with that one
        yield from self._chunks_as(size, lambda number: number <= last or skip(number), text=True)

    def _options(self, types: "Mapping[str, pyarrow.DataType]") -> CsvOptions:
        options = csv_options(self.path, types, self.reading)
        # done here per column, because some columns keep their cells unchanged
        options["convert_options"].strings_can_be_null = False
        options["parse_options"].invalid_row_handler = lambda row: "skip"
        return options

    def _open(self, options: CsvOptions) -> "pyarrow.csv.CSVStreamingReader":
        from pyarrow import csv

        raw = arrow().OSFile(os.fsencode(self.path), "rb")
        if self.path.name.lower().endswith(".gz"):
            raw = arrow().CompressedInputStream(raw, "gzip")
        return csv.open_csv(raw, read_options(self.reading, use_threads=False), **options)

    def _types(self, text: bool) -> "dict[str, pyarrow.DataType]":
        """Return the types of the columns whose types are not inferred from the first rows."""
        pa = arrow()
        words = dict.fromkeys((*self.text, *self.verbatim), pa.string())
        types = {**dict.fromkeys(self.numeric, pa.float64()), **words}
        header = self.header()
        self.check_columns(header.names)
        undecided = [f.name for f in header if text or pa.types.is_null(f.type)]
        if not text:
            undecided = [name for name in undecided if name not in types]
        wanted = header.names if self.columns is None else self.columns
        return {**types, **{name: pa.string() for name in undecided if name in wanted}}

    def _chunks_as(self, size: int, skip: Callable[[int], bool], text: bool) -> Iterator[Chunk]:
        pa = arrow()
        bad: dict[int, str] = {}

        def invalid(row: "pyarrow.csv.InvalidRow") -> str:
            # `number` counts lines of the file from 1, the header among them
            bad[row.number - 2] = (
                f"the row has {row.actual_columns} cells, and there are {row.expected_columns} columns"
            )
            return "skip"

        options = self._options(self._types(text))
        options["parse_options"].invalid_row_handler = invalid
        options["convert_options"].include_columns = list(self.columns or [])
        reader = self._open(options)
        nulls = pa.array(options["convert_options"].null_values, pa.string())
        next_row, number = 0, 0
        held: list[pyarrow.RecordBatch] = []
        places: list[int] = []
        reported: set[int] = set()

        def cut(table: "pyarrow.Table", rows: list[int]) -> Chunk:
            low, high = number * size, (number + 1) * size
            new = sorted(r for r in bad if low <= r < high and r not in reported)
            reported.update(new)
            return Chunk(number, np.array(rows, np.int64), table, [(r, bad[r]) for r in new])

        for batch in _batches(reader):
            batch = _without_words_for_missing(batch, nulls, self.verbatim)
            rows = []
            while len(rows) < len(batch):  # readable rows take the numbers that no unreadable row has
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
                if at < len(rows):  # the next row belongs to the next chunk
                    if not skip(number):
                        yield cut(pa.Table.from_batches(held), places)
                    held, places, number = [], [], number + 1
        # a file without rows gives one chunk without rows
        final = max([*places[-1:], *(r for r in bad if r not in reported), 0])
        empty = reader.schema.empty_table()
        while number * size <= final:
            rest = pa.Table.from_batches([b for b in held if len(b)], reader.schema) if held else empty
            if not skip(number):
                yield cut(rest, places)
            held, places, number = [], [], number + 1


def _without_words_for_missing(
    batch: "pyarrow.RecordBatch", nulls: "pyarrow.Array", verbatim: Sequence[str]
) -> "pyarrow.RecordBatch":
    """Return the batch with null instead of words for a missing cell, like `NA`, in columns of text."""
    pa, pc = arrow(), compute()
    columns = [
        pc.if_else(pc.is_in(column, value_set=nulls), None, column)
        if pa.types.is_string(field.type) and field.name not in verbatim
        else column
        for field, column in zip(batch.schema, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _batches(reader: "pyarrow.csv.CSVStreamingReader") -> "Iterator[pyarrow.RecordBatch]":
    while True:
        try:
            yield reader.read_next_batch()
        except StopIteration:
            return
