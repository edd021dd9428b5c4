"""The tensors of an artifact: one safetensors file, whose names and sizes are checked before its data is read."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from vbdl.artifact.files import open_regular
from vbdl.artifact.manifest import MAX_AXES, MAX_TENSORS, TENSORS, ArtifactError, Manifest, TensorEntry, strict_object
from vbdl.types import Json

MAX_HEADER_BYTES = 4 * 2**20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def entries(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """The manifest's entries for these tensors: dtype and shape by name."""
    for name, t in tensors.items():
        if t.dtype not in CODES:
            raise ValueError(f"{name} is {t.dtype}, which an artifact cannot hold; use one of {sorted(DTYPES)}")
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"the predictor has {len(tensors)} tensors; an artifact holds at most {MAX_TENSORS}")
    return {n: TensorEntry(CODES[t.dtype], list(t.shape)) for n, t in tensors.items()}


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as the bytes of a safetensors file. Each is copied, because safetensors refuses shared memory."""
    return write_tensors({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()})


def read_tensors(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the tensors by name; ArtifactError if they are not exactly those of the manifest.

    The file is read into memory and not mapped: truncating a mapped file would kill the process.
    """
    with _opened(path, manifest) as (file, start, _):
        data = start + file.read(manifest.file_bytes - len(start))
        _check_end(file, len(data), manifest)
    _check_digest(hashlib.sha256(data), manifest)
    try:
        return parse_tensors(data)
    except SafetensorError as error:
        raise ArtifactError(f"{TENSORS} cannot be read: {error}") from None


def read_share(path: Path, manifest: Manifest, prefix: str, own: range) -> dict[str, Tensor]:
    """Read the tensors like `read_tensors`, but of those whose name begins with `prefix` only rows `own` of axis 0.

    The whole file is read for its digest, but only the returned tensors and one block are held in memory.
    """
    tensors: dict[str, Tensor] = {}
    with _opened(path, manifest) as (file, start, header):
        digest, total = hashlib.sha256(start), len(start)
        for name in sorted(header, key=lambda n: (header[n]["data_offsets"], n)):
            entry, (begin, end) = manifest.tensors[name], header[name]["data_offsets"]
            shape, low, high = entry.shape, 0, end - begin
            if name.startswith(prefix) and shape:
                each = (end - begin) // max(shape[0], 1)
                low, high, shape = own.start * each, own.stop * each, [len(own), *shape[1:]]
            kept = bytearray(high - low)
            at = 0
            while block := file.read(min(_BLOCK, end - begin - at)):
                digest.update(block)
                first, last = max(low, at), min(high, at + len(block))
                if first < last:
                    kept[first - low : last - low] = block[first - at : last - at]
                at += len(block)
            total += at
            dtype = DTYPES[entry.dtype]
            tensors[name] = (torch.frombuffer(kept, dtype=dtype) if kept else torch.empty(0, dtype=dtype)).reshape(
                shape
            )
        _check_end(file, total, manifest)
    _check_digest(digest, manifest)
    return tensors


_BLOCK = 2**20  # bytes read at a time


@contextlib.contextmanager
def _opened(path: Path, manifest: Manifest) -> Iterator[tuple[BinaryIO, bytes, Json]]:
    """Open the file and check its header: (file positioned at the data, bytes read so far, parsed header)."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size != manifest.file_bytes:
            raise ArtifactError(
                f"{TENSORS} has {size} bytes, the manifest says {manifest.file_bytes}: it was truncated or replaced"
            )
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise ArtifactError(
                f"the header of {TENSORS} claims {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed, and no "
                f"more than the file has"
            )
        header = file.read(header_bytes)
        yield file, prefix + header, _check_header(header, manifest.tensors, size - 8 - header_bytes)


def _check_end(file: BinaryIO, read: int, manifest: Manifest) -> None:
    if read != manifest.file_bytes or file.read(1):
        raise ArtifactError(f"{TENSORS} changed while it was read")


def _check_digest(digest: "hashlib._Hash", manifest: Manifest) -> None:
    if digest.hexdigest() != manifest.file_sha256:
        raise ArtifactError(f"{TENSORS} does not have the SHA-256 in the manifest: it was damaged or replaced")


def _check_header(header: bytes, expected: Mapping[str, TensorEntry], data_bytes: int) -> Json:
    """Parse the header; ArtifactError unless names, dtypes and shapes are the manifest's and the tensors cover the data
    exactly, without gaps or overlaps."""
    try:
        header_entries = json.loads(header.decode("utf-8"), object_pairs_hook=strict_object)
    except ArtifactError as error:
        raise ArtifactError(f"the header of {TENSORS} is invalid: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header of {TENSORS} is not JSON: {error}") from None
    if not isinstance(header_entries, dict):
        raise ArtifactError(f"the header of {TENSORS} is not a JSON object")
    header_entries.pop("__metadata__", None)
    if len(header_entries) > MAX_TENSORS:
        raise ArtifactError(f"{TENSORS} names {len(header_entries)} tensors; at most {MAX_TENSORS} are allowed")
    if header_entries.keys() != expected.keys():
        odd = sorted(header_entries.keys() ^ expected.keys())
        raise ArtifactError(
            f"{TENSORS} and the manifest name different tensors: {ascii(odd[0][:80])} is only in one of them"
        )
    spans = []
    for name, entry in header_entries.items():
        stated = expected[name]
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ArtifactError(f"the header's entry of {name[:80]!r} must have exactly dtype, shape and data_offsets")
        if entry["dtype"] not in DTYPES or entry["dtype"] != stated.dtype:
            raise ArtifactError(
                f"tensor {name[:80]!r} is {str(entry['dtype'])[:20]}, the manifest says {stated.dtype[:20]}; "
                f"allowed are {sorted(DTYPES)}"
            )
        if entry["shape"] != stated.shape or len(stated.shape) > MAX_AXES:
            raise ArtifactError(
                f"tensor {name[:80]!r} has shape {str(entry['shape'])[:80]}, the manifest says {stated.shape}"
            )
        span = entry["data_offsets"]
        if not (isinstance(span, list) and len(span) == 2 and all(type(o) is int for o in span)):
            raise ArtifactError(f"the data_offsets of tensor {name[:80]!r} are not two ints")
        needed = math.prod(stated.shape) * DTYPES[stated.dtype].itemsize
        if span[1] - span[0] != needed:
            raise ArtifactError(
                f"tensor {name[:80]!r} of shape {stated.shape} needs {needed} bytes and has {span[1] - span[0]}"
            )
        if needed == 0 and max(stated.shape, default=0) > data_bytes + 1:
            raise ArtifactError(f"tensor {name[:80]!r} of shape {stated.shape} is empty, but has a huge axis")
        spans.append((span[0], span[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ArtifactError(f"tensor {name[:80]!r} starts at byte {start}, expected {end}")
        end = stop
    if end != data_bytes:
        raise ArtifactError(f"the tensors of {TENSORS} take {end} bytes, but its data has {data_bytes}")
    return header_entries
