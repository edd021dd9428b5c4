"""A .npy file as a source of rows."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vbdl.batch.sources.source import Chunk, JsonValue, Source, file_state, file_version, one_line

_DIMENSIONS = 32  # largest number of axes of an array; NumPy's limit is 64, and network inputs have few


@dataclass
class ArrayFile(Source):
    """A .npy file of numbers, whose first axis is the rows."""

    path: Path
    name: str

    def state(self) -> dict[str, JsonValue]:
        return file_state(self.path, self.name)

    def version(self) -> tuple[int, ...] | None:
        return file_version(self.path)

    def count(self) -> int | None:
        try:
            return self._header()[0][0]
        except (ValueError, OSError):
            return None  # reported when the file is read

    def _header(self) -> tuple[tuple[int, ...], np.dtype, int]:
        """Return (shape, dtype, byte offset of the first number). Raises ValueError for a shape without rows."""
        with open(self.path, "rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
            except Exception as error:  # NumPy evaluates the header, which may raise any error
                raise ValueError(f"{self.path} is not a .npy file: {one_line(error)}") from error
            place, size = file.tell(), os.fstat(file.fileno()).st_size
        if dtype.kind not in "biuf" or fortran or not shape:
            raise ValueError(f"{self.path} holds {dtype}, a scalar or columns first: save a C-ordered array of numbers")
        if len(shape) > _DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape) or 0 in shape[1:]:
            raise ValueError(f"{self.path} has no shape of rows: {str(shape)[:80]}")
        if shape[0] and math.prod(shape[1:]) * dtype.itemsize > size - place:
            raise ValueError(f"{self.path} ends before the first of its rows of {' x '.join(map(str, shape[1:]))[:80]}")
        return shape, dtype, place

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        shape, dtype, offset = self._header()
        row = math.prod(shape[1:])
        there = min(shape[0], (os.stat(self.path).st_size - offset) // (row * dtype.itemsize))
        with open(self.path, "rb") as file:
            for number in range(max(1, -(-there // size))):
                if skip(number):
                    continue
                start, rows = number * size, min(size, shape[0] - number * size)
                file.seek(offset + start * row * dtype.itemsize)
                values = np.fromfile(file, dtype, min(rows, there - start) * row)
                if len(values) != rows * row:
                    break
                values = values.reshape(rows, *shape[1:])
                with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, and their rows are rejected
                    values = values.astype(np.float32 if dtype.kind in "fb" else np.int64)
                yield Chunk(number, np.arange(start, start + rows), torch.from_numpy(values))
        if there < shape[0]:
            raise ValueError(f"{self.path} ends before row {there} of {str(shape[0])[:40]}")
