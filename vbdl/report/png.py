"""Images as PNG data URLs, so that the page needs no other file."""

import base64
import struct
import zlib

import torch
from torch import Tensor

_COLOR = {1: 0, 3: 2}  # channels -> PNG's color type


def data_url(pixels: Tensor) -> str:
    """Encode pixels, (height, width, 1 or 3) uint8, as "data:image/png;base64,..."."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] not in _COLOR:
        raise ValueError(f"pixels must be uint8 (height, width, 1 or 3), got {pixels.dtype} {tuple(pixels.shape)}")
    height, width, channels = pixels.shape
    lines = pixels.reshape(height, width * channels)
    filtered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), lines], dim=1)  # filter type 0 before every line
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOR[channels], 0, 0, 0)
    body = zlib.compress(filtered.contiguous().numpy().tobytes(), 9)
    chunks = (_chunk(b"IHDR", head), _chunk(b"IDAT", body), _chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
