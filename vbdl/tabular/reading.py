"""Tables from files and from memory, always as a `pyarrow.Table`: CSV (also .gz), Parquet, Arrow IPC."""

import gzip
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

# an empty cell, and what programs write for one; the same list for numbers and for text
NULLS = ["", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "None"]


def arrow() -> Any:
    """The module pyarrow; ModuleNotFoundError that says what to install."""
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error
    return pyarrow


def compute() -> Any:
    """The module pyarrow.compute, whose functions are made when it is imported, unseen by a type checker."""
    import pyarrow.compute

    return pyarrow.compute


def format_of(path: str | Path) -> str | None:
    """csv, parquet or ipc by the file's name, None for anything else."""
    name = Path(path).name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def files_of(path: str | Path, suffixes: Sequence[str] = tuple(SUFFIXES)) -> list[Path]:
    """The file, or every table in the folder and below it by name; hidden ones and those with a leading _ are not
    read. ValueError where there are none."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_file():
        return [path]
    found = []
    for folder, below, names in os.walk(path):
        below[:] = sorted(d for d in below if not d.startswith((".", "_")))
        found += [
            Path(folder, n) for n in names if not n.startswith((".", "_")) and n.lower().endswith(tuple(suffixes))
        ]
    if not found:
        raise ValueError(f"there is no {', '.join(suffixes)} file in {path}")
    return sorted(found)


def csv_options(path: Path, column_types: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `pyarrow.csv.read_csv` and `open_csv` are called with, so that both read a cell the same way. ValueError
    where the first line is separated by something else, as spreadsheets of some languages do."""
    from pyarrow import csv

    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    header, row = _first_lines(path)
    # the name of a single column may have such a mark in it, and then its cells have not
    other = next((m for m in (";", "\t", ",") if m in header and (not row or row.count(m) >= header.count(m))), None)
    if other is not None and delimiter not in header:
        raise ValueError(f"{path} separates its columns by {other!r}: a .csv file has commas, a .tsv file tabs")
    return {
        "parse_options": csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "convert_options": csv.ConvertOptions(
            null_values=NULLS, strings_can_be_null=True, column_types=dict(column_types or {})
        ),
    }


def _first_lines(path: Path) -> tuple[str, str]:
    """The line of names, and the one after it, empty where there is none."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        header, row = file.readline(1 << 20), file.readline(1 << 20)
    try:
        return header.decode(), row.decode(errors="replace")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the first line is not text in UTF-8: save the file as UTF-8") from error


def read_table(path: str | Path) -> Any:
    """The table in this file, or in all files of this folder one after the other."""
    pa = arrow()
    tables = [_read_file(file) for file in files_of(path)]
    if len(tables) == 1:
        return tables[0]
    names = tables[0].column_names
    for file, table in zip(files_of(path), tables, strict=True):
        if sorted(table.column_names) != sorted(names):
            raise ValueError(f"{file} has other columns than the first file: {sorted(table.column_names)}")
    # text where one file has numbers and another has not: the wider type is taken
    return pa.concat_tables([t.select(names) for t in tables], promote_options="permissive")


def _read_file(path: Path) -> Any:
    pa = arrow()
    kind = format_of(path)
    try:
        if kind == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.ParquetFile(path).read()
        if kind == "csv":
            from pyarrow import csv

            # types are inferred from the first block: one block, so that a late decimal point is seen
            block = min(max(path.stat().st_size * (12 if path.name.endswith(".gz") else 1) + 1, 1 << 20), 2**31 - 1)
            table = csv.read_csv(path, csv.ReadOptions(block_size=block), **csv_options(path))
            if bytes_in := [field.name for field in table.schema if pa.types.is_binary(field.type)]:
                raise ValueError(f"{path}: column {bytes_in[0]!r} is not text in UTF-8: save the file as UTF-8")
            return table
        if kind == "ipc":
            with pa.memory_map(str(path)) as source:
                if source.read(6) == b"ARROW1":
                    return pa.ipc.open_file(source).read_all()
                source.seek(0)
                return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:  # what is damaged is either, by the place of the damage
        raise ValueError(f"{path} cannot be read as {kind}: {error}".strip()) from error
    raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}")


def as_table(data: Any) -> Any:
    """A `pyarrow.Table` of: a path, a table or record batch, a pandas or polars frame, or columns by name. ValueError
    where two columns have one name: which of them is meant is not for a program to guess."""
    table = _without_views(_converted(data))
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two columns are called {twice!r}: rename one of them, or leave it out")
    return table


def _without_views(table: Any) -> Any:
    """Text as strings, where it comes as views, as from polars: Arrow's own functions do not take them all."""
    pa = arrow()
    for place, field in enumerate(table.schema):
        kind: Any = None
        if str(field.type) == "string_view":
            kind = pa.large_string()
        elif pa.types.is_dictionary(field.type) and str(field.type.value_type) == "string_view":
            kind = pa.dictionary(field.type.index_type, pa.large_string())
        if kind is not None:
            table = table.set_column(place, field.name, table.column(place).cast(kind))
    return table


def _converted(data: Any) -> Any:
    pa = arrow()
    if isinstance(data, str | Path):
        return read_table(data)
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, pa.RecordBatch):
        return pa.Table.from_batches([data])
    if isinstance(data, Mapping):
        return pa.table({str(name): column for name, column in data.items()})
    if type(data).__module__.startswith("pandas."):
        return pa.Table.from_pandas(data, preserve_index=False)
    if hasattr(data, "__arrow_c_stream__"):
        return pa.table(data)
    raise TypeError(
        f"a table is a path, a pyarrow.Table, a pandas frame or a dict of columns; got {type(data).__name__}"
    )
