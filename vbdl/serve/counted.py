"""Large JSON bodies are checked by counting brackets and commas before any value is built, then built in pieces.

Eight MiB of `[],[],...` would become three million lists, which take 200 MiB and block other requests for seconds;
counting the bytes takes milliseconds. A body of the right structure is parsed a few thousand values at a time into the
returned array, so that other threads run in between.
"""

import json
import math
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from vbdl.serve.limits import Refused

LARGE = 64 * 2**10  # bytes: a smaller body is cheap to build, whatever it holds
PIECE = 16 * 2**10  # bytes of numbers that are parsed at a time
ROWS = 128  # rows of a table that are parsed at a time
_BLOCK = 2**20
_CELL = 4 * 2**10  # largest mean size in bytes of a row's cells: longer text is no category


def outside_strings(text: bytes) -> bytes:
    """Return valid JSON without the content of its strings, so that brackets, colons and commas can be counted."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    outside, inside = [], np.uint8(0)
    for start in range(0, len(text), _BLOCK):
        block = np.frombuffer(text, np.uint8, min(_BLOCK, len(text) - start), start)
        parity = (np.cumsum(block == ord('"'), dtype=np.uint8) & 1) ^ inside
        outside.append(block[parity == 0].tobytes())
        inside = parity[-1]
    return b"".join(outside)


def refuse_twice(text: bytes, keys: int) -> None:
    """Raise Refused if an object in valid JSON has a key twice.

    keys: the number of keys that the decoder kept in all objects; of two equal keys it keeps the last.
    """
    if text.count(b":") > keys and outside_strings(text).count(b":") > keys:
        if len(text) <= LARGE:
            json.loads(text, object_pairs_hook=_pairs)
        raise Refused(400, "bad_json", "a key is given twice in one object")


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        name = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise Refused(400, "bad_json", f"the key {name[:60]!r} is given twice in one object")
    return unique


def array(
    text: bytes,
    shape: tuple[int, ...],
    dtype: np.dtype,
    max_rows: int,
    name: str,
    build: Callable[[bytes], np.ndarray],
) -> np.ndarray:
    """Parse nested JSON arrays as an array of rows of this shape and dtype.

    text: valid JSON. build: values from a JSON array of them, checked, before they get the dtype.
    """
    row = _skeleton(shape)
    opened, commas = text.count(b"["), text.count(b",")
    if opened > 1 + max_rows * row.count(b"[") or commas > max_rows * (1 + row.count(b",")):
        message = f"{name!r} holds more than {max_rows} rows of shape {list(shape)}: at most {max_rows} rows are taken"
        raise Refused(413, "too_many_rows", message)
    rows = (opened - 1) // row.count(b"[") if shape else commas + 1
    # without its values a body consists of brackets and commas, which its shape determines
    values = b"truefalse" if dtype.kind == "b" else b"0123456789+-.eE"
    skeleton = text.translate(None, values + b" \t\r\n")
    if len(skeleton) != 1 + rows * (len(row) + 1) or skeleton != b"[" + b",".join([row] * rows) + b"]":
        raise Refused(
            422, "bad_body", f"rows of {name!r} have shape {list(shape)}: these are ragged, or hold something else"
        )
    del skeleton
    flat = np.empty(rows * math.prod(shape), dtype)
    at = 0
    for piece in _pieces(text) if flat.size else ():
        part = build(b"[" + piece + b"]")
        flat[at : at + len(part)] = part
        at += len(part)
    return flat.reshape(rows, *shape)


def _skeleton(shape: tuple[int, ...]) -> bytes:
    """The brackets and commas that a row of this shape has in JSON."""
    return b"[" + b",".join([_skeleton(shape[1:])] * shape[0]) + b"]" if shape else b""


def _pieces(text: bytes) -> Iterator[bytes]:
    """Yield the values, with commas between them, a few thousand at a time."""
    start = 0
    while start < len(text):
        end = text.find(b",", start + PIECE)
        end = len(text) if end < 0 else end
        yield text[start:end].translate(None, b"[] \t\r\n")
        start = end + 1


def rows(text: bytes, columns: int, max_rows: int, build: Callable[[bytes, int], dict]) -> Iterator[list[dict]]:
    """Yield rows of a table, some at a time. build: makes a row from its JSON and its number."""
    bare = outside_strings(text)
    objects, cells, commas = bare.count(b"{"), bare.count(b":"), bare.count(b",")
    if objects > max_rows:
        raise Refused(413, "too_many_rows", f"{objects} rows, at most {max_rows} are taken")
    # cells and rows have one comma in between: more commas mean that an element is no row
    if bare.count(b"[") != 1 or commas >= max(1, cells + objects) or cells > columns * objects:
        raise Refused(422, "bad_body", f"rows are objects of {columns} cells, and these hold something else")
    del bare
    raws = msgspec.json.decode(text, type=list[msgspec.Raw])
    for start in range(0, len(raws), ROWS):
        yield [
            build(_row(raw, columns, number), number) for number, raw in enumerate(raws[start : start + ROWS], start)
        ]


def _row(raw: msgspec.Raw, columns: int, number: int) -> bytes:
    text = bytes(raw)
    if len(text) > LARGE + columns * _CELL:
        raise Refused(422, "bad_row", f"row {number}: takes {len(text)} bytes, and has {columns} columns")
    if text.count(b":") > columns and outside_strings(text).count(b":") > columns:
        raise Refused(422, "bad_row", f"row {number}: has more cells than the {columns} columns")
    return text
