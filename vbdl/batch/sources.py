"""Where rows come from: arrays, images, tables in memory and data sets, a chunk at a time (files of tables:
`vbdl.batch.table_file`).

A source cuts its rows into chunks of a given size, numbered from 0, whatever pieces its file is stored in. Chunks that
are done already are skipped, without reading them where the format allows that. Rows keep the number that they have in
the file, a header not counted, also where rows before them cannot be read.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vbdl.tabular.reading import files_of

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass
class Chunk:
    """Consecutive rows of a source."""

    number: int
    rows: np.ndarray  # (n,) int64 row numbers in the source
    data: Any  # a pyarrow.Table, or tensors in the form the network takes, of the same n rows
    rejected: list[tuple[int, str]] = field(default_factory=list)  # (row number, reason), rows that are not in data


class Source(Protocol):
    """One file, table or data set."""

    name: str

    def state(self) -> dict[str, Any]:
        """What changes when the source does."""
        ...

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        """Chunks of `size` rows, those not wanted left out. ValueError with the place where it cannot be read."""
        ...

    def count(self) -> int | None:
        """Rows, where that is known without reading them."""
        ...


@dataclass
class ArrayFile:
    """A .npy file, rows first."""

    path: Path
    name: str

    def state(self) -> dict[str, Any]:
        return file_state(self.path, self.name)

    def count(self) -> int | None:
        return self._header()[0][0]

    def _header(self) -> tuple[tuple[int, ...], np.dtype, int]:
        with open(self.path, "rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
            except ValueError as error:
                raise ValueError(f"{self.path} is not a .npy file: {error}") from error
            if dtype.hasobject or fortran or not shape:
                raise ValueError(f"{self.path} holds objects, a scalar or columns first: save a C-ordered array")
            return shape, dtype, file.tell()

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        shape, dtype, offset = self._header()
        row = int(np.prod(shape[1:], dtype=np.int64))
        with open(self.path, "rb") as file:
            for number in range(-(-shape[0] // size)):
                if skip(number):
                    continue
                start, rows = number * size, min(size, shape[0] - number * size)
                file.seek(offset + start * row * dtype.itemsize)
                values = np.fromfile(file, dtype, rows * row)
                if len(values) != rows * row:
                    raise ValueError(f"{self.path} ends before row {start + len(values) // max(row, 1)} of {shape[0]}")
                values = values.reshape(rows, *shape[1:])
                data = torch.from_numpy(values.astype(np.float32) if dtype.kind in "fb" else values.astype(np.int64))
                yield Chunk(number, np.arange(start, start + rows), data)


@dataclass(frozen=True)
class ImageRow:
    """What a model takes of an image: (channels, height, width), (height, width, channels) or (height, width), of
    numbers in [0, 1] where its dtype is floating, and of bytes where not."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def mode(self) -> str | None:
        """The mode of Pillow with these channels; None where they are those of no image."""
        return {1: "L", 3: "RGB", 4: "RGBA"}.get(self._channels)

    @property
    def _channels(self) -> int:
        if len(self.shape) == 2:
            return 1
        return self.shape[0] if self.shape[0] in (1, 3, 4) else self.shape[-1]

    def of(self, values: np.ndarray) -> Tensor:
        """The row of (height, width, channels) bytes. ValueError for an image of another size."""
        found = torch.from_numpy(values)
        if len(self.shape) == 2:
            found = found.squeeze(2)
        elif self.shape[0] in (1, 3, 4):
            found = found.permute(2, 0, 1)
        if tuple(found.shape) != self.shape:
            raise ValueError(f"the image is {tuple(found.shape)}, and the model takes {self.shape}")
        return found.to(self.dtype) / 255 if self.dtype.is_floating_point else found.to(self.dtype)


@dataclass
class ImageFolder:
    """Images of a folder and below, by name. (channels, height, width) in [0, 1], all of one size.

    row: of the model, in place of that. transform: (channels, height, width) -> what the network takes, for one image.
    """

    path: Path
    name: str = "images"
    mode: str = "RGB"  # of Pillow: "L" for grey
    transform: Callable[[Tensor], Tensor] | None = None
    row: ImageRow | None = None
    identity = "path"

    def __post_init__(self):
        self.files = files_of(self.path, IMAGES)

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "files": [file_state(f, str(f.relative_to(self.path))) for f in self.files]}

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
                except (OSError, ValueError, SyntaxError) as error:
                    rejected.append((row, f"{file.relative_to(self.path)}: {error}"))
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
        found = torch.from_numpy(values).permute(2, 0, 1).float() / 255
        return found if self.transform is None else self.transform(found)


@dataclass
class DatasetSource:
    """A map-style data set of inputs, or of (input, target) pairs, whose targets are not looked at."""

    dataset: Any
    name: str = "dataset"
    pairs: bool | None = None  # whether an item is (input, target); tuples of two are, unless told otherwise

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "rows": len(self.dataset)}

    def count(self) -> int | None:
        return len(self.dataset)

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        n = len(self.dataset)
        for number in range(-(-n // size)):
            if skip(number):
                continue
            start = number * size
            found, rows, rejected = [], [], []
            for row in range(start, min(start + size, n)):
                try:
                    item = self.dataset[row]
                except Exception as error:  # a data set of one's own fails in its own ways
                    rejected.append((row, f"{type(error).__name__}: {error}"))
                    continue
                pair = isinstance(item, tuple) and len(item) == 2 if self.pairs is None else self.pairs
                found.append(item[0] if pair else item)
                rows.append(row)
            data = torch.utils.data.default_collate(found) if found else torch.empty(0)
            yield Chunk(number, np.array(rows, np.int64), data, rejected)


@dataclass
class MemoryTable:
    """A pyarrow.Table."""

    table: Any
    name: str = "table"

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "rows": self.table.num_rows, "bytes": self.table.nbytes}

    def count(self) -> int | None:
        return self.table.num_rows

    def chunks(self, size: int, skip: Callable[[int], bool]) -> Iterator[Chunk]:
        for number in range(-(-self.table.num_rows // size)):
            if not skip(number):
                part = self.table.slice(number * size, size)
                yield Chunk(number, np.arange(number * size, number * size + part.num_rows), part)


def file_state(path: Path, name: str) -> dict[str, Any]:
    about = os.stat(path)
    return {"name": name, "bytes": about.st_size, "modified": about.st_mtime_ns}
