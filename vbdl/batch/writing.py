"""Files that are whole or not there, and tables in the formats of the output."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vbdl.batch.arrays import write_array
from vbdl.tabular.reading import arrow


def temporary(path: Path, folder: Path | None = None) -> Path:
    """A new empty file under a hidden name that no other process has, in the folder of `path` unless told another."""
    while True:
        found = (folder or path.parent) / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            os.close(os.open(found, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            continue
        return found


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside this path, bring it to the disk, rename it: there is a whole file or none."""
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
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def identity(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def is_as_recorded(path: Path, record: dict[str, Any], since: int | None) -> bool:
    """Whether a file is there with the recorded size and content.

    since: a time in nanoseconds; the content of a file that was neither written, renamed nor replaced at or after it
    is not read again. None reads every file.
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


def sink(path: Path) -> Any:
    """The file, to be written by Arrow: names that are not UTF-8 too."""
    return arrow().OSFile(os.fsencode(path), "wb")


def write_table(table: Any, path: Path, kind: str) -> None:
    """A table in one of FORMATS; the same table gives the same bytes."""
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


def parquet_options(schema: Any) -> dict[str, Any]:
    """Dictionaries where words repeat; numbers are written as they are, which is faster and no larger."""
    words = [f.name for f in schema if arrow().types.is_string(f.type)]
    return {"use_dictionary": words, "write_statistics": False}


def with_source(table: Any, source: str) -> Any:
    """The table with its source in every row."""
    pa = arrow()
    return table.add_column(0, "source", pa.array([source] * table.num_rows, pa.string()))


def flat(table: Any, fixed: bool = True) -> Any:
    """Lists as text, for formats that have no cells for them; fixed: also those of one length."""
    pa = arrow()
    for place, column in enumerate(table.schema):
        if pa.types.is_nested(column.type) and (fixed or not pa.types.is_fixed_size_list(column.type)):
            words = [None if v is None else json.dumps(v) for v in table.column(place).to_pylist()]
            table = table.set_column(place, column.name, pa.array(words, pa.string()))
    return table
