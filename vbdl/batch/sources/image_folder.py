"""A folder of images as a source of rows, and the form of an image as a model takes it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vbdl.batch.sources.source import Chunk, JsonValue, Source, file_state, file_version, one_line, printable
from vbdl.tabular.reading import files_of

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


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

    def state(self) -> dict[str, JsonValue]:
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
            images: list[Tensor] = []
            rows, rejected = [], []
            for row, file in enumerate(self.files[start : start + size], start):
                try:
                    image = self._read(file)
                    if images and image.shape != images[0].shape:
                        raise ValueError(f"the image is {tuple(image.shape)}, the first {tuple(images[0].shape)}")
                    images.append(image)
                    rows.append(row)
                except ModuleNotFoundError:
                    raise
                except Exception as error:  # decoders raise errors of many kinds
                    rejected.append((row, printable(f"{file.relative_to(self.path)}: {one_line(error)}")))
            data = torch.stack(images) if images else torch.empty(0)
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
