"""What is the same in all parts of a job, settled before the first row is computed: inputs, and types of kept columns.

Each file has its own idea of a column's type, and the first rows of a CSV file say little about the later ones.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vbdl.batch.sources import Source
from vbdl.batch.table_file import TableFile
from vbdl.batch.worker import Options
from vbdl.tabular import Schema
from vbdl.tabular.reading import arrow


@dataclass
class Settled:
    """A job's sources and options, and the Arrow types of the input columns in its output."""

    sources: list[Source]
    options: Options
    kept: dict[str, Any]


def settle(sources: list[Source], options: Options, schema: Schema | None) -> Settled:
    """Look at every file once. ValueError where a kept column has types that no one column can hold."""
    files = [s for s in sources if isinstance(s, TableFile)]
    if schema is None and options.inputs is None and (inputs := _inputs(files, options.keep)) is not None:
        options = dataclasses.replace(options, inputs=tuple(inputs))
        columns = list(dict.fromkeys([*inputs, *options.keep]))
        sources = [
            dataclasses.replace(s, columns=columns, numeric=inputs) if isinstance(s, TableFile) else s for s in sources
        ]
        files = [s for s in sources if isinstance(s, TableFile)]
    kept: dict[str, Any] = {}
    if options.keep and files:
        types = [(file.name, known) for file in files if (known := file.types()) is not None]
        for name in options.keep:
            of_files = [(file, known[name]) for file, known in types if name in known]
            if of_files:
                kept[name] = _common(name, of_files)
    return Settled(sources, options, kept)


def _inputs(files: Sequence[TableFile], keep: Sequence[str]) -> list[str] | None:
    """The columns of numbers of the first file, which are then those of all; None where it has vectors, or nothing."""
    if not any(file.is_csv for file in files):
        return None
    types = next((known for file in files if (known := file.types(every=True)) is not None), {})
    check = arrow().types
    if any(check.is_fixed_size_list(kind) for kind in types.values()):
        return None
    numbers = [n for n, kind in types.items() if check.is_integer(kind) or check.is_floating(kind)]
    return [n for n in numbers if n not in keep] or None


def _common(name: str, types: Sequence[tuple[str, Any]]) -> Any:
    """The narrowest type that holds all cells as they are: a number where that is exact, text where it is not."""
    pa = arrow()
    check = pa.types
    distinct = list(dict.fromkeys(kind for _, kind in types if not check.is_null(kind)))
    if len(distinct) < 2:
        return distinct[0] if distinct else types[0][1]
    plain = [kind.value_type if check.is_dictionary(kind) else kind for kind in distinct]
    for file, kind in types:
        if check.is_nested(kind) or check.is_binary(kind):
            raise ValueError(
                f"column {name!r} holds {kind} in {file} and other types in other files: no one column holds both. "
                f"Leave it out of keep, or predict the files into outputs of their own"
            )
    if all(check.is_integer(kind) for kind in plain):
        low = min(np.iinfo(kind.to_pandas_dtype()).min for kind in plain)
        high = max(np.iinfo(kind.to_pandas_dtype()).max for kind in plain)
        return next((k for k in (pa.int64(), pa.uint64()) if _holds(k, low, high)), pa.string())
    if all(check.is_floating(kind) or (check.is_integer(kind) and kind.bit_width <= 32) for kind in plain):
        return pa.float64()
    return pa.large_string() if any(check.is_large_string(kind) for kind in plain) else pa.string()


def _holds(kind: Any, low: int, high: int) -> bool:
    limits = np.iinfo(kind.to_pandas_dtype())
    return bool(limits.min <= low and high <= limits.max)
