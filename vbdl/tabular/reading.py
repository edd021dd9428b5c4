"""Reading of tables from files (CSV, also .gz, Parquet, Arrow IPC) and from memory as a `pyarrow.Table`."""

import codecs
import gzip
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypedDict, runtime_checkable

import msgspec

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.csv

ArrowColumn: TypeAlias = "pyarrow.Array | pyarrow.ChunkedArray"

INSTALL = "tables need pyarrow: pip install 'vbdl[tables]'"

SUFFIXES = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".tsv": "csv",
    ".tsv.gz": "csv",
    ".parquet": "parquet",
    ".arrow": "ipc",
    ".feather": "ipc",
    ".ipc": "ipc",
}

# an empty cell and the words that programs write for it, for numbers and text
NULLS = ["", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "None"]

_SEPARATORS = (";", "\t", ",", "|")


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Options for reading text in files and cells; a schema keeps them for the files that are predicted.

    separator, encoding: of CSV files; the separator is inferred from the first line unless given. decimal, thousands:
    decimal mark and thousands separator. missing: words for a missing cell, in files and in memory, besides an empty
    cell. date_format: an order or a format of `vbdl.tabular.dates`. text: columns whose cells are kept as text.
    """

    separator: str | None = None
    encoding: str | None = None
    decimal: str | None = None
    thousands: str | None = None
    missing: tuple[str, ...] = tuple(NULLS)
    date_format: str | None = None
    text: tuple[str, ...] = ()

    def __post_init__(self):
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '\r\n"'):
            raise ValueError(f"a separator is one character, got {self.separator!r}")
        if self.decimal not in (None, ".", ","):
            raise ValueError(f"a decimal mark is . or , and got {self.decimal!r}")
        if self.thousands not in (None, "", ".", ",", "'", " "):
            raise ValueError(f"a mark between thousands is one of . , ' or a space, got {self.thousands!r}")
        if self.decimal is not None and self.decimal == self.thousands:
            raise ValueError(f"{self.decimal!r} cannot stand before decimals and between thousands")
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError as error:
                raise ValueError(f"there is no encoding {self.encoding!r}: utf-8, latin-1, cp1252, utf-16") from error


def arrow() -> ModuleType:
    """The module pyarrow. Raises ModuleNotFoundError with what to install if it is not installed."""
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error
    return pyarrow


def compute() -> ModuleType:
    """The module pyarrow.compute, whose functions no type checker knows, because they are created at import."""
    import pyarrow.compute

    return pyarrow.compute


def format_of(path: str | Path) -> str | None:
    """The format by the name of the file: "csv", "parquet", "ipc", or None for another file."""
    name = Path(path).name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def files_of(path: str | Path, suffixes: Sequence[str] = tuple(SUFFIXES)) -> list[Path]:
    """Return the file, or every table file in the folder and below it, sorted by name.

    Files with a leading . or _ are left out. Raises ValueError if there are none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_file():
        return [path]
    files = []
    for folder, below, names in os.walk(path):
        below[:] = sorted(d for d in below if not d.startswith((".", "_")))
        files += [
            Path(folder, n) for n in names if not n.startswith((".", "_")) and n.lower().endswith(tuple(suffixes))
        ]
    if not files:
        raise ValueError(f"there is no {', '.join(suffixes)} file in {path}")
    return sorted(files)


class CsvOptions(TypedDict):
    """The options that `pyarrow.csv.read_csv` and `open_csv` share."""

    parse_options: "pyarrow.csv.ParseOptions"
    convert_options: "pyarrow.csv.ConvertOptions"


def csv_options(
    path: Path,
    column_types: "Mapping[str, pyarrow.DataType] | None" = None,
    reading: Reading | None = None,
    notes: list[str] | None = None,
) -> CsvOptions:
    """The options of `pyarrow.csv.read_csv` and `open_csv`, so that both read a cell the same way."""
    from pyarrow import csv

    separator = _separator(path, reading, notes)
    reading = reading or Reading()
    types = {name: arrow().string() for name in reading.text} | dict(column_types or {})
    return {
        "parse_options": csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        "convert_options": csv.ConvertOptions(
            null_values=["", *reading.missing],
            strings_can_be_null=True,
            column_types=types,
            decimal_point=reading.decimal or ".",
        ),
    }


def read_options(
    reading: Reading | None = None, *, block_size: int | None = None, use_threads: bool = True
) -> "pyarrow.csv.ReadOptions":
    """The ReadOptions of pyarrow.csv with the encoding of the files."""
    from pyarrow import csv

    encoding = (reading and reading.encoding) or "utf8"
    return csv.ReadOptions(encoding=encoding, block_size=block_size, use_threads=use_threads)


def _separator(path: Path, reading: Reading | None, notes: list[str] | None) -> str:
    """Return the character that separates the cells of this file.

    It is the given one, or a comma (a tab in .tsv files) if the header has one, or else another mark that the header
    and the next line have. Raises ValueError for such a mark if no options were given for the file.
    """
    expected = (reading and reading.separator) or ("\t" if ".tsv" in path.name.lower() else ",")
    header, row = _first_lines(path, reading and reading.encoding)
    if expected in header:
        return expected
    # the name of a single column may contain such a mark; its cells then do not
    mark = next((m for m in _SEPARATORS if m in header and (not row or row.count(m) >= header.count(m))), None)
    if mark is None:
        return expected
    if reading is None:
        raise ValueError(
            f"{path} separates its columns by {mark!r}: a .csv file has commas, a .tsv file tabs, unless a separator "
            f"is given"
        )
    if notes is not None:
        notes.append(f"{path.name} separates its columns by {mark!r} (--separator says another)")
    return mark


def _first_lines(path: Path, encoding: str | None) -> tuple[str, str]:
    """Return the header and the next line, empty if the file has none."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        start = file.read(1 << 20)
    if encoding is None and start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError(f"{path} is text in UTF-16: --encoding utf-16")
    whole = len(start) < 1 << 20
    try:
        text = codecs.getincrementaldecoder(encoding or "utf-8")("strict").decode(start, final=whole)
    except UnicodeDecodeError as error:
        if encoding is None and b"\n" not in start[: error.start]:
            raise ValueError(f"{path}: the first line is not text in UTF-8: {_ENCODINGS}") from error
        if encoding is not None:
            raise ValueError(f"{path} is not text in {encoding}: {error.reason}") from error
        text = start.decode("utf-8", "replace")
    lines = [*text.splitlines(), "", ""]
    return lines[0], lines[1]


_ENCODINGS = "--encoding latin-1, cp1252 or another says what it is, or save the file as UTF-8"


def read_table(path: str | Path, reading: Reading | None = None, notes: list[str] | None = None) -> "pyarrow.Table":
    """Read a file, or the files of a folder one after the other, as one table. notes: receives notes for the user."""
    pa = arrow()
    tables = [_read_file(file, reading, notes) for file in files_of(path)]
    if len(tables) == 1:
        return tables[0]
    names = tables[0].column_names
    for file, table in zip(files_of(path), tables, strict=True):
        if sorted(table.column_names) != sorted(names):
            raise ValueError(f"{file} has other columns than the first file: {sorted(table.column_names)}")
    # a column of numbers in one file and text in another becomes text
    return pa.concat_tables([t.select(names) for t in tables], promote_options="permissive")


def _read_file(path: Path, reading: Reading | None, notes: list[str] | None) -> "pyarrow.Table":
    pa = arrow()
    kind = format_of(path)
    try:
        if kind == "parquet":
            import pyarrow.parquet

            return _validated(pyarrow.parquet.ParquetFile(path).read())
        if kind == "csv":
            from pyarrow import csv

            # types are inferred from the first block, so the whole file is one block: a late decimal point counts too
            block = min(max(path.stat().st_size * (12 if path.name.endswith(".gz") else 1) + 1, 1 << 20), 2**31 - 1)
            options = csv_options(path, None, reading, notes)
            table = csv.read_csv(path, read_options(reading, block_size=block), **options)
            if bytes_in := [field.name for field in table.schema if pa.types.is_binary(field.type)]:
                raise ValueError(f"{path}: column {bytes_in[0]!r} is not text in UTF-8: {_ENCODINGS}")
            return table
        if kind == "ipc":
            with pa.OSFile(os.fsencode(path), "rb") as source:
                is_file = source.read(6) == b"ARROW1"
                source.seek(0)
                return _validated((pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all())
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:  # Arrow raises other errors for other damage
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as {kind}: {reason}") from error
    raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")


def _validated(table: "pyarrow.Table") -> "pyarrow.Table":
    """The table after a check of its offsets, which in a damaged file may point anywhere in memory. Raises ArrowInvalid
    if they are wrong."""
    table.validate(full=True)
    return table


def as_table(data: object, reading: Reading | None = None, notes: list[str] | None = None) -> "pyarrow.Table":
    """Return data as a `pyarrow.Table`: a path, a table or record batch, a pandas or polars frame, or columns by name.

    reading: options for files. Raises ValueError if two columns have one name.
    """
    table = _without_views(_converted(data, reading, notes))
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two columns are called {twice!r}: rename one of them, or leave it out")
    return table


def _without_views(table: "pyarrow.Table") -> "pyarrow.Table":
    """The table with string views (as polars has) cast to strings and run-end encoded columns decoded, because not all
    functions of Arrow take them."""
    pa = arrow()
    for place, field in enumerate(table.schema):
        kind: pyarrow.DataType | None = None
        if pa.types.is_run_end_encoded(field.type):
            runs = table.column(place).chunks
            column = pa.chunked_array([compute().run_end_decode(c) for c in runs], field.type.value_type)
            table = table.set_column(place, field.name, column)
        elif str(field.type) == "string_view":
            kind = pa.large_string()
        elif pa.types.is_dictionary(field.type) and str(field.type.value_type) == "string_view":
            kind = pa.dictionary(field.type.index_type, pa.large_string())
        if kind is not None:
            table = table.set_column(place, field.name, table.column(place).cast(kind))
    return table


@runtime_checkable
class ArrowStream(Protocol):
    """A table of another library, which Arrow can read without a copy."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


def _converted(data: object, reading: Reading | None, notes: list[str] | None) -> "pyarrow.Table":
    pa = arrow()
    if isinstance(data, str | Path):
        return read_table(data, reading, notes)
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, pa.RecordBatch):
        return pa.Table.from_batches([data])
    from vbdl.tabular import memory

    if isinstance(data, Mapping):
        return memory.from_columns(data)
    if memory.is_pandas(data):
        import pandas as pd

        if isinstance(data, pd.DataFrame):
            return memory.from_pandas(data)
    if isinstance(data, ArrowStream):
        return pa.table(data)
    raise TypeError(
        f"a table is a path, a pyarrow.Table, a pandas frame or a dict of columns; got {type(data).__name__}"
    )
