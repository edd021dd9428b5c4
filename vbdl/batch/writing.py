"""Atomic writing of files, and of tables in the formats of the output."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vbdl.batch.arrays import write_array
from vbdl.batch.records import FileIdentity
from vbdl.tabular.reading import arrow
from vbdl.types import Keywords

if TYPE_CHECKING:
    import pyarrow


def temporary(path: Path) -> Path:
    """Create an empty file beside `path`, under a hidden name that no other process has."""
    while True:
        hidden = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            os.close(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            continue
        return hidden


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: `write` writes a temporary file, which is flushed to the disk and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary(path)
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def identity(path: Path) -> FileIdentity:
    """Return the size and the SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def is_as_recorded(path: Path, record: FileIdentity, since: int | None) -> bool:
    """Whether a file exists with the recorded size and content.

    since: a time in nanoseconds; a file that was not written, renamed or replaced since then is not read again. None
    reads every file.
    """
    try:
        about = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if about.st_size != record["bytes"]:
        return False
    if since is not None and max(about.st_ctime_ns, about.st_mtime_ns) < since:
        return True
    return identity(path)["sha256"] == record["sha256"]


def sink(path: Path) -> "pyarrow.OSFile":
    """Open the file for writing by Arrow, even if its name is not UTF-8."""
    return arrow().OSFile(os.fsencode(path), "wb")


def write_table(table: "pyarrow.Table", path: Path, kind: str) -> None:
    """Write a table in one of FORMATS; equal tables give equal bytes."""
    pa = arrow()
    if kind == "npy":
        write_array(path, flat(table, fixed=False))
        return
    with sink(path) as file:
        if kind == "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, file, **parquet_options(table.schema))
        elif kind == "csv":
            from pyarrow import csv

            csv.write_csv(flat(table), file)
        else:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)


def parquet_options(schema: "pyarrow.Schema") -> Keywords:
    """Return the options for writing Parquet: dictionaries for text only, because numbers are written faster without
    them and take no more space."""
    words = [f.name for f in schema if arrow().types.is_string(f.type)]
    return {"use_dictionary": words, "write_statistics": False}


def with_source(table: "pyarrow.Table", source: str) -> "pyarrow.Table":
    """Return the table with a first column `source`, the name of its source."""
    pa = arrow()
    return table.add_column(0, "source", pa.array([source] * table.num_rows, pa.string()))


def flat(table: "pyarrow.Table", fixed: bool = True) -> "pyarrow.Table":
    """Return the table with lists as text, for formats without lists. fixed: also lists of one length."""
    pa = arrow()
    for place, column in enumerate(table.schema):
        if pa.types.is_nested(column.type) and (fixed or not pa.types.is_fixed_size_list(column.type)):
            words = [None if v is None else json.dumps(v) for v in table.column(place).to_pylist()]
            table = table.set_column(place, column.name, pa.array(words, pa.string()))
    return table
