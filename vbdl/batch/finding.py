"""Conversion of the data given to `predict_table` to sources: files, folders, tables, arrays, data sets."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from vbdl.batch.naming import part_name
from vbdl.batch.options import JobOptions
from vbdl.batch.sources.array_file import ArrayFile
from vbdl.batch.sources.image_folder import IMAGES, ImageFolder, ImageRow
from vbdl.batch.sources.in_memory import DatasetSource, Items, MemoryTable
from vbdl.batch.sources.source import Source, printable
from vbdl.batch.sources.table_file import TableFile
from vbdl.tabular import Schema, as_table
from vbdl.tabular.columns import Numeric
from vbdl.tabular.reading import SUFFIXES, files_of, format_of


def sources_of(
    data: object, schema: Schema | None, options: JobOptions, image: ImageRow | None = None
) -> Sequence[Source]:
    """Return the sources of `data` in order, after which parts are named. image: the form of the model's images."""
    if isinstance(data, str | Path):
        return _files(Path(data), schema, options, image)
    several = data if isinstance(data, list) else [data]
    sources = [source for source in several if isinstance(source, Source)]
    if sources and len(sources) == len(several):
        return sources
    if isinstance(data, torch.utils.data.Dataset):
        return [DatasetSource(cast(Items, data))]
    if isinstance(data, torch.Tensor) or (isinstance(data, np.ndarray) and type(data).__module__ == "numpy"):
        return [DatasetSource(torch.as_tensor(data), pairs=False)]
    return [MemoryTable(as_table(data))]


def _files(path: Path, schema: Schema | None, options: JobOptions, image: ImageRow | None) -> list[Source]:
    if path.is_dir():
        _check_readable(path)
        tables = [f for f in _maybe(path, (*SUFFIXES, ".npy"))]
        if not tables and _maybe(path, IMAGES):
            return [ImageFolder(path, row=image)]
        if not tables:
            raise ValueError(f"there is no table, array or image in {path}")
        names = [printable(str(f.relative_to(path))) for f in tables]
    else:
        tables = files_of(path)
        names = [printable(path.name)]
    wanted, text, numbers, verbatim = _columns(schema, options)
    sources: list[Source] = []
    for file, name in zip(tables, names, strict=True):
        if file.suffix.lower() == ".npy":
            sources.append(ArrayFile(file, name))
        elif format_of(file):
            reading = None if schema is None else schema.files
            sources.append(TableFile(file, name, wanted, numbers, text, verbatim, reading))
        else:
            raise ValueError(f"{file} is none of {', '.join((*SUFFIXES, '.npy'))}")
    stems = [part_name(n, 0, "parquet") for n in names]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ValueError(f"two inputs would be written to {stem}: give files names that differ before the suffix")
    return sources


def _check_readable(path: Path) -> None:
    """Raise OSError if a subfolder cannot be read, because its files would be missed silently."""

    def refuse(error: OSError) -> None:
        raise error

    for _, below, _ in os.walk(path, onerror=refuse):
        below[:] = [d for d in below if not d.startswith((".", "_"))]


def _maybe(path: Path, suffixes: Sequence[str]) -> list[Path]:
    try:
        return files_of(path, suffixes)
    except ValueError:
        return []


def _columns(schema: Schema | None, options: JobOptions) -> tuple[list[str] | None, list[str], list[str], list[str]]:
    """Return four lists of columns for files that do not store types: to read, of text, of numbers, and those whose
    cells are copied verbatim to the output."""
    if schema is None:
        inputs = list(options.inputs or ())
        verbatim = [name for name in options.keep if name not in inputs]
        wanted = None if options.inputs is None else list(dict.fromkeys([*inputs, *options.keep]))
        return wanted, [], inputs, verbatim
    text = schema.worded
    numbers = [c.name for c in schema.columns if isinstance(c, Numeric) and c.name not in set(text)]
    # dates and booleans are not inferred from the first rows either
    text = [*text, *(name for name in options.keep if name in schema.names and name not in {*numbers, *text})]
    verbatim = [name for name in options.keep if name not in schema.names]
    return list(dict.fromkeys([*schema.names, *options.keep])), text, numbers, verbatim
