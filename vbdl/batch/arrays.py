"""Tables as NumPy holds them: one structured array, a field a column, in a .npy file without pickle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vbdl.tabular.cells import combined
from vbdl.tabular.reading import arrow

_BLOCK = 65_536  # rows in memory while files are joined


def to_array(table: Any) -> np.ndarray:
    """(rows,) structured. Text is of fixed width, lists of one length are sub-arrays; a missing number is NaN, missing
    text is empty. ValueError for a column that NumPy has no type for."""
    columns = {name: _column(name, combined(table.column(name))) for name in table.column_names}
    found = np.empty(table.num_rows, [(name, c.dtype, c.shape[1:]) for name, c in columns.items()])
    for name, column in columns.items():
        found[name] = column
    return found


def _column(name: str, column: Any) -> np.ndarray:
    types = arrow().types
    kind = column.type
    if types.is_fixed_size_list(kind):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), kind.list_size)
    if types.is_dictionary(kind):
        return _column(name, column.cast(kind.value_type))
    if types.is_string(kind) or types.is_large_string(kind):
        words = ["" if v is None else v for v in column.to_pylist()]
        return np.array(words, dtype=f"<U{max([1, *map(len, words)])}")
    if types.is_boolean(kind) and column.null_count:
        raise ValueError(f"column {name!r} has missing cells among true and false, which a .npy file has no place for")
    found = column.to_numpy(zero_copy_only=False)
    if found.dtype.hasobject:
        raise ValueError(f"column {name!r} holds {kind}, which a .npy file has no type for: write Parquet or Arrow")
    return found


def write_array(path: Path, table: Any) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array(_Plain(file), to_array(table), allow_pickle=False)  # type: ignore[arg-type]


class _Plain:
    """A file that NumPy writes through Python: its own writing says nothing where the disk is full."""

    def __init__(self, file: BinaryIO):
        self.write = file.write


def join_arrays(out: Path, parts: Sequence[Path]) -> None:
    """One file of all parts, text as wide as the widest."""
    mapped = [np.load(p, mmap_mode="r", allow_pickle=False) for p in parts]
    wide = [(name, np.result_type(*(m.dtype[name] for m in mapped))) for name in mapped[0].dtype.names]
    dtype = np.dtype(wide)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (sum(map(len, mapped)),)}
    with open(out, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in mapped:
            for start in range(0, len(part), _BLOCK):
                file.write(part[start : start + _BLOCK].astype(dtype).tobytes())
