"""Sources of rows, read a chunk at a time: arrays, images, tables in memory and data sets (files of tables are in
`vbdl.batch.table_file`).

A source divides its rows into chunks of a given size, numbered from 0, however its file is stored. Finished chunks are
skipped, without reading them if the format allows that. A source without rows gives one chunk without rows, which knows
the columns. Rows keep their number in the file, without the header, even if rows before them cannot be read.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vbdl.tabular.reading import files_of
from vbdl.types import Inputs

if TYPE_CHECKING:
    import pyarrow

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
"""What JSON holds."""

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_DIMENSIONS = 32  # largest number of axes of an array; NumPy's limit is 64, and network inputs have few


@dataclass
class Chunk:
    """Consecutive rows of a source."""

    number: int
    rows: np.ndarray  # (n,) int64 row numbers in the source
    data: "pyarrow.Table | Inputs"  # the same n rows
    rejected: list[tuple[int, str]] = field(default_factory=list)  # (row number, reason) of rows that are not in data


@runtime_checkable
class Source(Protocol):
    """One file, table or data set: the base class of all sources."""

    name: str

    def state(self) -> dict[str, Json]:
        """Return JSON that changes when the source changes, and is equal for a copy of a file with the same times."""
        ...

    def version(self) -> object:
        """Return a value that changes when the source is written to or replaced; compared before and after reading.

        The default is `state()`; override it if the source can change while it is read.
        """
        return self.state()

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        """Yield chunks of `size` rows, except those for which `skip(number)` is true.

        Raises ValueError that names the place where the source cannot be read.
        """
        ...

    def count(self) -> int | None:
        """Return the number of rows, or None if it is unknown before reading."""
        ...


def file_version(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes when a file is written to, replaced, or given other times or permissions; None if
    there is no file."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def printable(text: str) -> str:
    """Return the text with bytes of file names that are not UTF-8 written like %E9."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass
class ArrayFile(Source):
    """A .npy file of numbers, whose first axis is the rows."""

    path: Path
    name: str

    def state(self) -> dict[str, Json]:
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


@dataclass(frozen=True)
class ImageRow:
    """The shape and dtype of an image as a model takes it.

    The shape is (channels, height, width), (height, width, channels) or (height, width); numbers are in [0, 1] if the
    dtype is floating-point, else 0 to 255.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def mode(self) -> str | None:
        """Pillow's mode with this number of channels, or None if there is no such mode."""
        return {1: "L", 3: "RGB", 4: "RGBA"}.get(self._channels)

    @property
    def _channels(self) -> int:
        if len(self.shape) == 2:
            return 1
        return self.shape[0] if self.shape[0] in (1, 3, 4) else self.shape[-1]

    def of(self, values: np.ndarray) -> Tensor:
        """Return the row of an image of (height, width, channels) bytes. Raises ValueError for another size."""
        row = torch.from_numpy(values)
        if len(self.shape) == 2:
            row = row.squeeze(2)
        elif self.shape[0] in (1, 3, 4):
            row = row.permute(2, 0, 1)
        if tuple(row.shape) != self.shape:
            raise ValueError(f"the image is {tuple(row.shape)}, and the model takes {self.shape}")
        return row.to(self.dtype) / 255 if self.dtype.is_floating_point else row.to(self.dtype)


@dataclass
class ImageFolder(Source):
    """The images in a folder and below, sorted by name, as (channels, height, width) in [0, 1]; all have one size.

    row: shape and dtype of the model's images, instead of these. transform: a function of one image, (channels, height,
    width) -> network input.
    """

    path: Path
    name: str = "images"
    mode: str = "RGB"  # Pillow's mode, "L" for gray
    transform: Callable[[Tensor], Tensor] | None = None
    row: ImageRow | None = None

    def __post_init__(self):
        self.files = files_of(self.path, IMAGES)

    def state(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "files": [file_state(f, printable(str(f.relative_to(self.path)))) for f in self.files],
        }

    def version(self) -> list[tuple[int, ...] | None]:
        return [file_version(f) for f in self.files]

    def count(self) -> int | None:
        return len(self.files)

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        for number in range(-(-len(self.files) // size)):
            if skip(number):
                continue
            start = number * size
            found, rows, rejected = [], [], []
            for row, file in enumerate(self.files[start : start + size], start):
                try:
                    image = self._read(file)
                    if found and image.shape != found[0].shape:
                        raise ValueError(f"the image is {tuple(image.shape)}, the first {tuple(found[0].shape)}")
                    found.append(image)
                    rows.append(row)
                except ModuleNotFoundError:
                    raise
                except Exception as error:  # decoders raise errors of many kinds
                    rejected.append((row, printable(f"{file.relative_to(self.path)}: {one_line(error)}")))
            data = torch.stack(found) if found else torch.empty(0)
            yield Chunk(number, np.array(rows, np.int64), data, rejected)

    def _read(self, file: Path) -> Tensor:
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("images need Pillow: pip install pillow") from error
        row = None if self.row is None or self.row.mode is None or self.transform is not None else self.row
        with Image.open(file) as image:
            values = np.array(image.convert(self.mode if row is None else row.mode))
        values = values[..., None] if values.ndim == 2 else values
        if row is not None:
            return row.of(values)
        pixels = torch.from_numpy(values).permute(2, 0, 1).float() / 255
        return pixels if self.transform is None else self.transform(pixels)


class Items(Protocol):
    """A map-style data set of torch, or any other object with a length and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass
class DatasetSource(Source):
    """A map-style data set of inputs, or of (input, target) pairs, whose targets are ignored."""

    dataset: Items
    name: str = "dataset"
    pairs: bool | None = None  # whether an item is (input, target); by default a tuple of two is

    def state(self) -> dict[str, Json]:
        return {"name": self.name, "rows": len(self.dataset)}

    def count(self) -> int | None:
        return len(self.dataset)

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        n = len(self.dataset)
        for number in range(max(1, -(-n // size))):
            if skip(number):
                continue
            start = number * size
            found, rows, rejected = [], [], []
            for row in range(start, min(start + size, n)):
                try:
                    item = self.dataset[row]
                except Exception as error:  # a user's data set may raise any error
                    rejected.append((row, f"{type(error).__name__}: {error}"))
                    continue
                pair = isinstance(item, tuple) and len(item) == 2 if self.pairs is None else self.pairs
                found.append(item[0] if pair else item)
                rows.append(row)
            none = self.dataset[:0] if isinstance(self.dataset, Tensor) else torch.empty(0)
            data = torch.utils.data.default_collate(found) if found else none
            yield Chunk(number, np.array(rows, np.int64), data, rejected)


@dataclass
class MemoryTable(Source):
    """A pyarrow.Table in memory."""

    table: "pyarrow.Table"
    name: str = "table"

    def state(self) -> dict[str, Json]:
        return {"name": self.name, "rows": self.table.num_rows, "bytes": self.table.nbytes}

    def count(self) -> int | None:
        return self.table.num_rows

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        for number in range(max(1, -(-self.table.num_rows // size))):
            if not skip(number):
                part = self.table.slice(number * size, size)
                yield Chunk(number, np.arange(number * size, number * size + part.num_rows), part)


def file_state(path: Path, name: str) -> dict[str, Json]:
    about = os.stat(path)
    return {"name": name, "bytes": about.st_size, "modified": about.st_mtime_ns}
