"""What is to be read: sources of whatever data `predict_table` is given."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vbdl.batch.naming import part_name
from vbdl.batch.sources import IMAGES, ArrayFile, DatasetSource, ImageFolder, ImageRow, MemoryTable, Source, printable
from vbdl.batch.table_file import TableFile
from vbdl.batch.worker import Options
from vbdl.tabular import Schema, as_table
from vbdl.tabular.columns import Numeric
from vbdl.tabular.reading import SUFFIXES, files_of, format_of


def sources_of(data: Any, schema: Schema | None, options: Options, image: ImageRow | None = None) -> list[Source]:
    """The sources of data in any form that `predict_table` takes, in order. Names are what parts are called after.
    image: what the model takes of an image."""
    if isinstance(data, str | Path):
        return _files(Path(data), schema, options, image)
    given: list[Any] = data if isinstance(data, list) else [data]
    if given and all(hasattr(s, "chunks") and hasattr(s, "state") for s in given):
        return given
    if isinstance(data, torch.utils.data.Dataset):
        return [DatasetSource(data)]
    if type(data).__module__ == "numpy" or isinstance(data, torch.Tensor):
        return [DatasetSource(torch.as_tensor(data), pairs=False)]
    return [MemoryTable(as_table(data))]


def _files(path: Path, schema: Schema | None, options: Options, image: ImageRow | None) -> list[Source]:
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
    found: list[Source] = []
    for file, name in zip(tables, names, strict=True):
        if file.suffix.lower() == ".npy":
            found.append(ArrayFile(file, name))
        elif format_of(file):
            reading = None if schema is None else schema.files
            found.append(TableFile(file, name, wanted, numbers, text, verbatim, reading))
        else:
            raise ValueError(f"{file} is none of {', '.join((*SUFFIXES, '.npy'))}")
    stems = [part_name(n, 0, "parquet") for n in names]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ValueError(f"two inputs would be written to {stem}: give files names that differ before the suffix")
    return found


def _check_readable(path: Path) -> None:
    """OSError where a folder below cannot be looked into: its files would be left out without a word."""

    def said(error: OSError) -> None:
        raise error

    for _, below, _ in os.walk(path, onerror=said):
        below[:] = [d for d in below if not d.startswith((".", "_"))]


def _maybe(path: Path, suffixes: Sequence[str]) -> list[Path]:
    try:
        return files_of(path, suffixes)
    except ValueError:
        return []


def _columns(schema: Schema | None, options: Options) -> tuple[list[str] | None, list[str], list[str], list[str]]:
    """Columns to read, and which of them are words, which numbers, and which cells to carry over as they stand, where a
    file does not say."""
    if schema is None:
        inputs = list(options.inputs or ())
        verbatim = [name for name in options.keep if name not in inputs]
        wanted = None if options.inputs is None else list(dict.fromkeys([*inputs, *options.keep]))
        return wanted, [], inputs, verbatim
    text = schema.worded
    numbers = [c.name for c in schema.columns if isinstance(c, Numeric) and c.name not in set(text)]
    # what a date or a boolean looks like, too, is not for the first rows to say
    text = [*text, *(name for name in options.keep if name in schema.names and name not in {*numbers, *text})]
    verbatim = [name for name in options.keep if name not in schema.names]
    return list(dict.fromkeys([*schema.names, *options.keep])), text, numbers, verbatim
