"""The tensors of an artifact: one safetensors file, every name and size of it checked before a byte of data is read."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from vbdl.artifact.files import open_regular
from vbdl.artifact.manifest import MAX_AXES, MAX_TENSORS, TENSORS, ArtifactError, Manifest, TensorEntry, strict_object

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
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def entries(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """What the manifest says of these tensors."""
    for name, t in tensors.items():
        if t.dtype not in CODES:
            raise ValueError(f"{name} is {t.dtype}, which an artifact does not hold; it holds {sorted(DTYPES)}")
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"there are {len(tensors)} tensors, an artifact holds {MAX_TENSORS}")
    return {n: TensorEntry(CODES[t.dtype], list(t.shape)) for n, t in tensors.items()}


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file. Every tensor is copied, because views of one memory are not taken."""
    return write_tensors({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()})


def read_tensors(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors, which are exactly those of the manifest; ArtifactError otherwise.

    The file is read into memory and not mapped: one that is cut short while it is mapped ends the process.
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
    """The tensors, of those whose names begin with `prefix` only the entries `own` of the first axis; ArtifactError as
    for all. The file is read to its end for its digest, in memory of what is returned."""
    found: dict[str, Tensor] = {}
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
            found[name] = (torch.frombuffer(kept, dtype=dtype) if kept else torch.empty(0, dtype=dtype)).reshape(shape)
        _check_end(file, total, manifest)
    _check_digest(digest, manifest)
    return found


_BLOCK = 2**20  # bytes in memory beside what is kept


@contextlib.contextmanager
def _opened(path: Path, manifest: Manifest) -> Iterator[tuple[BinaryIO, bytes, dict[str, Any]]]:
    """The file after its header, what was read of it, and the header, which has been found to be the manifest's."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size != manifest.file_bytes:
            raise ArtifactError(
                f"{TENSORS} has {size} bytes, the manifest says {manifest.file_bytes}: it was cut short or exchanged"
            )
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise ArtifactError(
                f"the header of {TENSORS} says that it has {header_bytes} bytes; at most {MAX_HEADER_BYTES} and no "
                f"more than the file are taken"
            )
        header = file.read(header_bytes)
        yield file, prefix + header, _check_header(header, manifest.tensors, size - 8 - header_bytes)


def _check_end(file: BinaryIO, read: int, manifest: Manifest) -> None:
    if read != manifest.file_bytes or file.read(1):
        raise ArtifactError(f"{TENSORS} changed while it was read")


def _check_digest(digest: Any, manifest: Manifest) -> None:
    if digest.hexdigest() != manifest.file_sha256:
        raise ArtifactError(f"the bytes of {TENSORS} are not those the manifest was written for: damaged or exchanged")


def _check_header(header: bytes, expected: Mapping[str, TensorEntry], data_bytes: int) -> dict[str, Any]:
    """The header: names, dtypes and shapes are the manifest's, and the data is exactly covered, without holes or
    overlaps."""
    try:
        found = json.loads(header.decode("utf-8"), object_pairs_hook=strict_object)
    except ArtifactError as error:
        raise ArtifactError(f"header of {TENSORS}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the header of {TENSORS} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"the header of {TENSORS} is not an object of JSON")
    found.pop("__metadata__", None)
    if len(found) > MAX_TENSORS:
        raise ArtifactError(f"{TENSORS} names {len(found)} tensors, more than {MAX_TENSORS}")
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        raise ArtifactError(
            f"the tensors of {TENSORS} are not those of the manifest: {ascii(odd[0][:80])} is in one of them only"
        )
    spans = []
    for name, entry in found.items():
        stated = expected[name]
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ArtifactError(f"tensor {name[:80]!r} is not described by dtype, shape and data_offsets")
        if entry["dtype"] not in DTYPES or entry["dtype"] != stated.dtype:
            raise ArtifactError(
                f"tensor {name[:80]!r} is {str(entry['dtype'])[:20]}, the manifest says {stated.dtype[:20]}; "
                f"an artifact holds {sorted(DTYPES)}"
            )
        if entry["shape"] != stated.shape or len(stated.shape) > MAX_AXES:
            raise ArtifactError(
                f"tensor {name[:80]!r} has shape {str(entry['shape'])[:80]}, the manifest says {stated.shape}"
            )
        span = entry["data_offsets"]
        if not (isinstance(span, list) and len(span) == 2 and all(type(o) is int for o in span)):
            raise ArtifactError(f"tensor {name[:80]!r} has no offsets")
        needed = math.prod(stated.shape) * DTYPES[stated.dtype].itemsize
        if span[1] - span[0] != needed:
            raise ArtifactError(
                f"tensor {name[:80]!r} of shape {stated.shape} needs {needed} bytes and has {span[1] - span[0]}"
            )
        if needed == 0 and max(stated.shape, default=0) > data_bytes + 1:
            raise ArtifactError(f"tensor {name[:80]!r} of shape {stated.shape} is empty and claims to be huge")
        spans.append((span[0], span[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ArtifactError(f"tensor {name[:80]!r} starts at byte {start} where {end} was expected")
        end = stop
    if end != data_bytes:
        raise ArtifactError(f"the tensors of {TENSORS} take {end} bytes, and there are {data_bytes}")
    return found
