"""Conversion of columns in memory to Arrow arrays: of pandas frames, of dicts, and of types that Arrow lacks.

Periods become the instants they begin at, intervals their names, sparse columns dense ones. Other
types are refused with the column's name and type.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from vbdl.tabular.reading import ArrowColumn, arrow

if TYPE_CHECKING:
    import pandas
    import pyarrow


@runtime_checkable
class Shaped(Protocol):
    """An array or series of NumPy, torch, polars or another library."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...

    def __iter__(self) -> Iterator[object]: ...


def is_pandas(values: object) -> bool:
    """Whether the value is of a type of pandas."""
    return type(values).__module__.partition(".")[0] == "pandas"


def from_pandas(frame: "pandas.DataFrame") -> "pyarrow.Table":
    """The pandas frame as a `pyarrow.Table`, without its index."""
    names = [str(name) for name in frame.columns]
    columns = [_series(name, frame.iloc[:, place]) for place, name in enumerate(names)]
    return arrow().Table.from_arrays(columns, names=names)


def from_columns(columns: Mapping[object, Iterable[object]]) -> "pyarrow.Table":
    """{name: list, array or Series} as a `pyarrow.Table`."""
    arrays = {str(name): _column(str(name), values) for name, values in columns.items()}
    lengths = {name: len(column) for name, column in arrays.items()}
    if len(set(lengths.values())) > 1:
        few, many = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
        raise ValueError(f"column {few!r} has {lengths[few]} rows, and column {many!r} has {lengths[many]}")
    return arrow().table(arrays)


def _column(name: str, values: Iterable[object]) -> ArrowColumn:
    pa = arrow()
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if is_pandas(values):
        import pandas as pd

        return _series(name, values if isinstance(values, pd.Series) else pd.Series(values))
    if isinstance(values, Shaped):
        if len(values.shape) != 1:
            raise ValueError(f"column {name!r} has the shape {tuple(values.shape)}: a column has one value a row")
    elif not isinstance(values, list):
        values = list(values)
    return _array(name, values, False)


def _series(name: str, series: "pandas.Series") -> ArrowColumn:
    """A pandas Series as an Arrow array."""
    import pandas as pd

    if series.dtype == object:
        series = series.infer_objects()
    dtype = series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        if isinstance(dtype.categories.dtype, pd.IntervalDtype | pd.PeriodDtype):
            series = series.cat.rename_categories([str(c) for c in dtype.categories])
    elif isinstance(dtype, pd.PeriodDtype):
        series = series.dt.to_timestamp()
    elif isinstance(dtype, pd.IntervalDtype):
        series = series.astype(object).map(lambda v: None if v is None or v != v else str(v))
    elif isinstance(dtype, pd.SparseDtype):
        series = series.sparse.to_dense()
    return _array(name, series, True)


def _is_missing(value: object) -> bool:
    try:
        return bool(value != value)
    except (TypeError, ValueError):  # pandas.NA has no truth value
        return True


def _array(name: str, values: "Shaped | list[object] | pandas.Series", from_pandas: bool) -> ArrowColumn:
    """The values as an Arrow array. Raises ValueError if Arrow has no type for them."""
    pa = arrow()
    dtype = values.dtype if isinstance(values, Shaped) else None
    kind = dtype.kind if isinstance(dtype, np.dtype) else ""
    if kind == "c":
        raise ValueError(f"column {name!r} holds complex numbers: give their real and imaginary parts as two columns")
    try:
        # pandas accepts pandas.NA in a list or an array of objects
        array = pa.array(values, from_pandas=from_pandas or isinstance(values, list) or kind == "O")
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        kinds = sorted({type(v).__name__ for v in list(values) if v is not None and not _is_missing(v)})
        several = f"values of several types ({', '.join(kinds)}: make them one, text for instance)"
        contents = several if len(kinds) > 1 else ", ".join(kinds) or str(kind)
        raise ValueError(f"column {name!r} holds {contents}, which is no type of a column: {error}") from error
    return array
