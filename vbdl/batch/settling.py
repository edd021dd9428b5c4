"""Choice of the inputs and of the types of kept columns before the first row, so that all parts of a job agree.

Files may give a column different types, and the first rows of a CSV file may not show the type of later rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vbdl.batch.job import Job
from vbdl.batch.sources.table_file import TableFile
from vbdl.tabular.reading import arrow

if TYPE_CHECKING:
    import pyarrow


def settle(job: Job) -> Job:
    """Return the job with its inputs and the types of its kept columns, after one look at each file.

    Raises ValueError if no type holds the cells of a kept column in all files.
    """
    sources, options, keep = job.sources, job.options, job.options.keep
    files = [s for s in sources if isinstance(s, TableFile)]
    if job.schema is None and options.inputs is None and (inputs := _inputs(files, keep)) is not None:
        options = dataclasses.replace(options, inputs=tuple(inputs))
        columns = list(dict.fromkeys([*inputs, *keep]))
        sources = tuple(
            dataclasses.replace(s, columns=columns, numeric=inputs) if isinstance(s, TableFile) else s for s in sources
        )
        files = [s for s in sources if isinstance(s, TableFile)]
    kept: dict[str, pyarrow.DataType] = {}
    if keep and files:
        types = [(file.name, known) for file in files if (known := file.types()) is not None]
        for name in keep:
            of_files = [(file, known[name]) for file, known in types if name in known]
            if of_files:
                kept[name] = _common(name, of_files)
    return dataclasses.replace(job, sources=sources, options=options, kept=kept)


def _inputs(files: Sequence[TableFile], keep: Sequence[str]) -> list[str] | None:
    """Return the columns of numbers in the first file, which all files must have.

    None if no file is a CSV file, or the first file has vectors or no numbers.
    """
    if not any(file.is_csv for file in files):
        return None
    types = next((known for file in files if (known := file.types(every=True)) is not None), {})
    check = arrow().types
    if any(check.is_fixed_size_list(kind) for kind in types.values()):
        return None
    numbers = [n for n, kind in types.items() if check.is_integer(kind) or check.is_floating(kind)]
    return [n for n in numbers if n not in keep] or None


def _common(name: str, types: "Sequence[tuple[str, pyarrow.DataType]]") -> "pyarrow.DataType":
    """Return a type that holds all cells exactly: a type of numbers if there is one, else text."""
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


def _holds(kind: "pyarrow.DataType", low: int, high: int) -> bool:
    limits = np.iinfo(kind.to_pandas_dtype())
    return bool(limits.min <= low and high <= limits.max)
