"""Encoding of a chunk's rows as network inputs, with reasons for rejected rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vbdl.batch.options import JobOptions
from vbdl.calling.inputs import tensors
from vbdl.tabular import Schema
from vbdl.tabular.cells import combined, floats
from vbdl.tabular.reading import arrow
from vbdl.types import Inputs

if TYPE_CHECKING:
    import pyarrow


@dataclass
class CellCounts:
    """Numbers of cells, by column, that differ in kind from those of the training rows."""

    unseen: dict[str, int] = field(default_factory=dict)  # cells with a category that training did not have
    filled: dict[str, int] = field(default_factory=dict)  # missing cells of columns that had none in training


@dataclass
class EncodedRows:
    """The rows of a chunk as network inputs."""

    x: Inputs
    rejected: dict[int, str]  # position in the chunk -> reason; the row of x is zero
    cells: CellCounts


class Encoder:
    """Turns the rows of a chunk into network inputs.

    row_shape: the shape of a row of the network's one input, or None if the model does not record it.
    """

    def __init__(self, schema: Schema | None, options: JobOptions, row_shape: tuple[int, ...] | None):
        self._schema, self._options, self._row_shape = schema, options, row_shape

    def encode(self, data: "pyarrow.Table | Inputs") -> EncodedRows:
        """Encode rows as network inputs. Raises ValueError if the table lacks a column that the model needs."""
        if isinstance(data, Tensor | Sequence | Mapping):
            return EncodedRows(data, _not_finite(data), CellCounts())
        if self._schema is not None:
            encoded = self._schema.encode(data)
            return EncodedRows(encoded.x, encoded.rejected, CellCounts(encoded.unseen, encoded.filled))
        return self._plain(data)

    def _plain(self, table: "pyarrow.Table") -> EncodedRows:
        """Encode the rows of a table for a model that was not trained on a table."""
        names = self._input_columns(table)
        if len(names) == 1 and arrow().types.is_fixed_size_list(table.schema.field(names[0]).type):
            values, rejected = _vectors(table.column(names[0]), names[0])
        else:
            values, rejected = _matrix(table, names)
        shape = self._row_shape
        if shape is not None and len(shape) == 1 and values.shape[1] != shape[0]:
            raise ValueError(
                f"the model takes rows of {shape[0]} numbers, and there are {values.shape[1]} columns of numbers "
                f"({', '.join(names[:6])}{', ...' if len(names) > 6 else ''}): name them with inputs"
            )
        return EncodedRows(torch.from_numpy(values), rejected, CellCounts())

    def _input_columns(self, table: "pyarrow.Table") -> list[str]:
        if self._options.inputs is not None:
            return list(self._options.inputs)
        types, shape = arrow().types, self._row_shape
        lists = [f.name for f in table.schema if types.is_fixed_size_list(f.type)]
        numbers = [
            f.name
            for f in table.schema
            if f.name not in self._options.keep and (types.is_integer(f.type) or types.is_floating(f.type))
        ]
        if len(lists) == 1 and (shape is None or table.schema.field(lists[0]).type.list_size == shape[0]):
            return lists
        if not numbers:
            raise ValueError(f"there is no column of numbers among {table.column_names}")
        return numbers


def _not_finite(x: Inputs) -> dict[int, str]:
    """Return {row: reason} for the rows with a floating-point number that is not finite."""
    rejected: dict[int, str] = {}
    for t in tensors(x):
        if t.is_floating_point() and not bool(torch.isfinite(t.sum())):
            finite: Tensor = t.flatten(1).isfinite().all(1) if t.ndim > 1 else t.isfinite()
            rejected |= {int(row): "the row is not finite" for row in (~finite).nonzero().flatten()}
    return rejected


def _matrix(table: "pyarrow.Table", names: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """Return the columns as a (rows, columns) float32 matrix, and {row: reason} of rejected rows, which are zero."""
    columns = np.empty((len(names), table.num_rows), np.float32)
    rejected: dict[int, str] = {}
    for place, name in enumerate(names):
        column, _, bad = floats(table.column(name), name)
        for row, reason in bad.items():
            rejected.setdefault(row, reason)
        with np.errstate(over="ignore"):
            columns[place] = column
    # torch transposes in blocks; copying one column at a time would miss the cache
    values = torch.from_numpy(columns).t().contiguous().numpy()
    finite = np.isfinite(values)
    if not finite.all():
        for row in np.flatnonzero(~finite.all(axis=1)).tolist():
            name = names[int(np.flatnonzero(~finite[row])[0])]
            rejected.setdefault(row, f"column {name!r}: missing or not finite")
            values[row] = 0
    return values, rejected


def _vectors(column: "pyarrow.ChunkedArray", name: str) -> tuple[np.ndarray, dict[int, str]]:
    """Return a column of lists of one length as a (rows, size) float32 matrix, and {row: reason} of the rejected rows,
    which are zero."""
    pa = arrow()
    array = combined(column)
    rejected: dict[int, str] = {}
    if array.null_count:
        missing = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
        rejected = {int(row): f"column {name!r}: missing" for row in missing}
        size = array.type.list_size
        array = pa.array([[0.0] * size if v is None else v for v in array.to_pylist()], array.type)
    flat = array.flatten().cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    values = flat.reshape(len(array), array.type.list_size).copy()
    finite = np.isfinite(values).all(axis=1)
    for row in np.flatnonzero(~finite).tolist():
        rejected.setdefault(row, f"column {name!r}: missing or not finite")
        values[row] = 0
    return values, rejected
