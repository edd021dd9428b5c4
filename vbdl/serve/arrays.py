"""Conversion of arrays in a request to input tensors of a network, checked against the input's shape and dtype."""

import math
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from vbdl.artifact.manifest import InputEntry
from vbdl.artifact.tensors import DTYPES
from vbdl.serve import counted
from vbdl.serve.counted import LARGE
from vbdl.serve.decoding import check_rows, decode
from vbdl.serve.json_schema import LARGEST
from vbdl.serve.limits import Refused

NUMPY = {torch.float16: "f2", torch.float32: "f4", torch.float64: "f8", torch.bfloat16: "f4"}


def tensor(array: np.ndarray, entry: InputEntry, name: str) -> Tensor:
    """Convert the rows of an array to a tensor of this input.

    Raises Refused for a wrong shape, a wrong kind of number, or a number that the dtype cannot hold.
    """
    dtype = DTYPES[entry.dtype]
    if list(array.shape[1:]) != list(entry.shape):
        raise Refused(422, "bad_body", f"a row of {name!r} has shape {entry.shape}, got {list(array.shape[1:])}")
    if dtype.is_floating_point:
        step = max(1, 2**16 // max(1, math.prod(entry.shape)))  # does not copy the whole array to float64
        for start in range(0, len(array), step):
            check_finite(array[start : start + step].astype(np.float64), name, dtype)
        # arrays from JSON have that dtype already; arrays on the bytes of a body are copied
        return torch.from_numpy(array.astype(NUMPY[dtype], copy=not array.flags.writeable)).to(dtype)
    if array.dtype.kind not in ("b" if dtype == torch.bool else "iu"):
        raise Refused(422, "bad_body", f"{name!r} holds {entry.dtype}, got {array.dtype}")
    kind = bool if dtype == torch.bool else np.int64
    whole = torch.from_numpy(array.astype(kind, copy=not array.flags.writeable))
    if not torch.equal(whole.to(dtype).to(whole.dtype), whole):
        raise Refused(422, "bad_body", f"{name!r} holds {entry.dtype}, and a number is beyond it")
    return whole.to(dtype)


def nested(raw: msgspec.Raw, entry: InputEntry, name: str, max_rows: int) -> np.ndarray:
    """Convert nested JSON arrays of numbers to an array. Raises Refused for booleans, text or a wrong depth."""
    dtype = DTYPES[entry.dtype]
    kind: Any  # built at run time: list[list[float]] for rows of two axes
    kind, stored = (float, "f8") if dtype.is_floating_point else (bool, "?") if dtype == torch.bool else (int, "i8")
    if memoryview(raw).nbytes > LARGE:

        def build(piece: bytes) -> np.ndarray:
            values = _stored(decode(piece, list[kind], f"{name}: "), stored, entry, name)
            if dtype.is_floating_point:
                check_finite(values, name, dtype)
            return values

        of_result = np.dtype(NUMPY.get(dtype, stored))
        return counted.array(bytes(raw), tuple(entry.shape), of_result, max_rows, name, build)
    for _ in range(len(entry.shape) + 1):
        kind = list[kind]
    values = decode(raw, kind, f"{name}: ")
    check_rows(len(values), max_rows)
    return _stored(values, stored, entry, name)


def _stored(values: list, stored: str, entry: InputEntry, name: str) -> np.ndarray:
    try:
        return np.array(values, dtype=stored)
    except (ValueError, OverflowError, TypeError):
        raise Refused(
            422, "bad_body", f"rows of {name!r} have shape {entry.shape}: these are ragged, or too large"
        ) from None


def check_finite(numbers: np.ndarray, name: str, dtype: torch.dtype) -> None:
    """Raise Refused for numbers that are not finite, or too large for a network to compute with in this dtype."""
    largest = min(LARGEST, torch.finfo(dtype).max)
    found = np.abs(numbers).max() if numbers.size else 0.0  # one pass: NaN if there is one, which no bound holds
    # a number that was float32 before, as in Arrow, may be the largest one rounded up
    if not (found <= largest or found == np.float32(largest)):
        raise Refused(422, "bad_body", f"{name!r} has a number that is not finite, or beyond {largest:g}")
