"""Input columns that are carried over to the output."""

from collections.abc import Mapping
from typing import Any

from vbdl.tabular.cells import combined, floats
from vbdl.tabular.reading import arrow


def as_settled(column: Any, name: str, kept: Mapping[str, Any]) -> Any:
    """A kept column as one array of the type that was settled."""
    pa = arrow()
    column, kind = combined(column), kept.get(name)
    if kind is None or column.type == kind:
        return column
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(kind) and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        values, missing, _ = floats(column, name)
        return pa.array(values, kind, mask=missing)
    return column.cast(kind)
