"""Reading of `.npy` arrays in requests: the header is matched against a fixed pattern and never evaluated.

https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import math
import re
import struct

import numpy as np

from vbdl.serve.limits import Refused

_LONGEST = 10_000  # largest header in bytes, NumPy's own limit
_ENTRY = re.compile(
    rb"\s*['\"](descr|fortran_order|shape)['\"]\s*:\s*"
    rb"(?:['\"]([<>|=]?[a-zA-Z?]\d{0,4})['\"]|(True|False)|\(\s*((?:\d{1,18}\s*,\s*)*(?:\d{1,18}\s*)?)\))\s*(?:,|$)"
)
_GROUPS = {b"descr": 2, b"fortran_order": 3, b"shape": 4}
_NUMBERS = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}


def read(body: bytes, axes: int) -> np.ndarray:
    """Return the array without copying the body. Raises Refused if it is damaged, not numeric, or has other axes."""
    if not body.startswith(b"\x93NUMPY") or len(body) < 12:
        raise _bad("it does not begin as one")
    if body[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise _bad(f"version {body[6]}.{body[7]} is not read")
    form = "<H" if body[6] == 1 else "<I"
    begin = 8 + struct.calcsize(form)
    end = begin + struct.unpack_from(form, body, 8)[0]
    if end - begin > _LONGEST or end > len(body):
        raise _bad("its header is too long")
    fortran, shape, dtype = _header(body[begin:end])
    size = math.prod(shape) * dtype.itemsize
    if len(body) - end != size:
        axes_text = "x".join(map(str, shape[:8])) + ("..." if len(shape) > 8 else "")
        raise _bad(f"an array of {axes_text[:80]} {dtype} takes another number of bytes than {len(body) - end}")
    if not shape:
        raise Refused(422, "bad_body", "an array has rows first, this is one number")
    if len(shape) != axes:
        raise Refused(422, "bad_body", f"the model takes an array of {axes} axes, got one of {len(shape)}")
    try:
        return np.frombuffer(body, dtype, offset=end).reshape(shape, order="F" if fortran else "C")
    except ValueError:  # an array of no numbers may still claim axes that are too long
        raise _bad("its shape is too large") from None


def _header(text: bytes) -> tuple[bool, tuple[int, ...], np.dtype]:
    """Return (whether the array is in Fortran order, shape, dtype) from the header."""
    text = text.strip()
    if not (text.startswith(b"{") and text.endswith(b"}")):
        raise _bad("its header is no dictionary")
    inner, at, fields = text[1:-1].strip(), 0, {}
    while at < len(inner):
        entry = _ENTRY.match(inner, at)
        value = None if entry is None else entry.group(_GROUPS[entry.group(1)])
        if entry is None or value is None or entry.group(1) in fields:
            raise _bad("its header says something else than one dtype, order and shape")
        fields[entry.group(1)] = value.decode()
        at = entry.end()
    if len(fields) != len(_GROUPS):
        raise _bad("its header lacks the dtype, the order, or the shape")
    kind = fields[b"descr"].lstrip("<>|=")
    if kind == "?":
        kind = "b1"
    if kind[0] not in _NUMBERS or not kind[1:] or int(kind[1:]) not in _NUMBERS[kind[0]]:
        raise Refused(422, "bad_body", f"an array of numbers of at most 64 bits is taken, not of {fields[b'descr']}")
    shape = tuple(int(size) for size in fields[b"shape"].split(",") if size.strip())
    order = ">" if fields[b"descr"].startswith(">") else "<"
    return fields[b"fortran_order"] == "True", shape, np.dtype(order + kind)


def _bad(reason: str) -> Refused:
    return Refused(400, "bad_npy", f"the body is no .npy array: {reason}")
