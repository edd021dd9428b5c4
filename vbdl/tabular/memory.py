"""Columns in memory as Arrow arrays: those of pandas frames, of dicts, and what Arrow has no type for.

Periods become the instants they begin at, intervals their names, sparse columns dense ones. What has no meaning as a
column is refused with the column's name and what it holds.
"""

from collections.abc import Mapping
from typing import Any

from vbdl.tabular.reading import arrow


def is_pandas(values: Any) -> bool:
    """Whether pandas has made this."""
    return type(values).__module__.partition(".")[0] == "pandas"


def from_pandas(frame: Any) -> Any:
    """A pandas frame as a `pyarrow.Table`, its index left out."""
    names = [str(name) for name in frame.columns]
    columns = [_series(name, frame.iloc[:, place]) for place, name in enumerate(names)]
    return arrow().Table.from_arrays(columns, names=names)


def from_columns(columns: Mapping[Any, Any]) -> Any:
    """{name: list, array or Series} as a `pyarrow.Table`."""
    made = {str(name): _column(str(name), values) for name, values in columns.items()}
    lengths = {name: len(column) for name, column in made.items()}
    if len(set(lengths.values())) > 1:
        few, many = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
        raise ValueError(f"column {few!r} has {lengths[few]} rows, and column {many!r} has {lengths[many]}")
    return arrow().table(made)


def _column(name: str, values: Any) -> Any:
    pa = arrow()
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if is_pandas(values):
        import pandas as pd

        return _series(name, values if isinstance(values, pd.Series) else pd.Series(values))
    shape = getattr(values, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"column {name!r} has the shape {tuple(shape)}: a column has one value a row")
    if not hasattr(values, "dtype") and not isinstance(values, list):
        values = list(values)
    return _made(name, values, False)


def _series(name: str, series: Any) -> Any:
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
    return _made(name, series, True)


def _is_missing(value: Any) -> bool:
    try:
        return bool(value != value)
    except (TypeError, ValueError):  # pandas' mark for a missing cell has no truth
        return True


def _made(name: str, values: Any, from_pandas: bool) -> Any:
    pa = arrow()
    kind = getattr(getattr(values, "dtype", None), "kind", "")
    if kind == "c":
        raise ValueError(f"column {name!r} holds complex numbers: give their real and imaginary parts as two columns")
    try:
        # which takes pandas' mark for a missing cell, in a list or an array of objects
        found = pa.array(values, from_pandas=from_pandas or isinstance(values, list) or kind == "O")
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        kinds = sorted({type(v).__name__ for v in list(values) if v is not None and not _is_missing(v)})
        several = f"values of several types ({', '.join(kinds)}: make them one, text for instance)"
        held = several if len(kinds) > 1 else ", ".join(kinds) or str(kind)
        raise ValueError(f"column {name!r} holds {held}, which is no type of a column: {error}") from error
    return found
