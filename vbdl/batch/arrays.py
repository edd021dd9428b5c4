"""Tables as structured arrays of NumPy, a field for each column, in .npy files without pickle."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from vbdl.tabular.cells import combined
from vbdl.tabular.reading import arrow

if TYPE_CHECKING:
    import pyarrow

_BLOCK = 65_536  # rows that are in memory while files are joined


def to_array(table: "pyarrow.Table") -> np.ndarray:
    """Convert a table to a structured array (rows,).

    Text gets a fixed width, lists of one length become sub-arrays, missing numbers NaN and missing text "". Raises
    ValueError for a column that NumPy has no type for.
    """
    columns = {name: _column(name, combined(table.column(name))) for name in table.column_names}
    array = np.empty(table.num_rows, [(name, c.dtype, c.shape[1:]) for name, c in columns.items()])
    for name, column in columns.items():
        array[name] = column
    return array


def _column(name: str, column: "pyarrow.Array") -> np.ndarray:
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
    array = column.to_numpy(zero_copy_only=False)
    if array.dtype.hasobject:
        raise ValueError(f"column {name!r} holds {kind}, which a .npy file has no type for: write Parquet or Arrow")
    return array


def write_array(path: Path, table: "pyarrow.Table") -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array(_Plain(file), to_array(table), allow_pickle=False)  # type: ignore[arg-type]


class _Plain:
    """A file that NumPy writes to through Python, because NumPy's own writing raises no error on a full disk."""

    def __init__(self, file: BinaryIO):
        self.write = file.write


def join_arrays(out: Path, parts: Sequence[Path]) -> None:
    """Write the rows of all parts to one file, with text as wide as the widest part's."""
    mapped = [np.load(p, mmap_mode="r", allow_pickle=False) for p in parts]
    wide = [(name, np.result_type(*(m.dtype[name] for m in mapped))) for name in mapped[0].dtype.names]
    dtype = np.dtype(wide)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (sum(map(len, mapped)),)}
    with open(out, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in mapped:
            for start in range(0, len(part), _BLOCK):
                file.write(part[start : start + _BLOCK].astype(dtype).tobytes())
