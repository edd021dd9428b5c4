"""Conversion of the input columns that are copied to the output."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vbdl.tabular.cells import combined, floats
from vbdl.tabular.reading import arrow

if TYPE_CHECKING:
    import pyarrow


def as_settled(column: "pyarrow.ChunkedArray", name: str, kept: "Mapping[str, pyarrow.DataType]") -> "pyarrow.Array":
    """Return a kept column as one array, in the type that all parts of the job have."""
    pa = arrow()
    array, kind = combined(column), kept.get(name)
    if kind is None or array.type == kind:
        return array
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_floating(kind) and (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        values, missing, _ = floats(array, name)
        return pa.array(values, kind, mask=missing)
    return array.cast(kind)
