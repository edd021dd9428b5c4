"""Large JSON bodies are checked by counting brackets and commas before any value is built, then built in pieces.

Eight MiB of `[],[],...` are three million lists, 200 MiB and seconds of everybody's time; as bytes they are counted in
milliseconds. A body of the right structure is read a few thousand values at a time into the array that is returned, so
that other threads get their turn in between.
"""

import json
import math
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from vbdl.serve.limits import Refused

LARGE = 64 * 2**10  # bytes: below this whatever a body holds is cheap to build
PIECE = 16 * 2**10  # bytes of numbers that are built at a time
ROWS = 128  # of a table that are built at a time
_BLOCK = 2**20
_CELL = 4 * 2**10  # bytes of a cell, on average over a row: longer text is no category


def outside_strings(text: bytes) -> bytes:
    """Valid JSON without the content of its strings, so that its brackets, colons and commas can be counted."""
    if b"\\" in text:
        text = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    kept, inside = [], np.uint8(0)
    for start in range(0, len(text), _BLOCK):
        block = np.frombuffer(text, np.uint8, min(_BLOCK, len(text) - start), start)
        parity = (np.cumsum(block == ord('"'), dtype=np.uint8) & 1) ^ inside
        kept.append(block[parity == 0].tobytes())
        inside = parity[-1]
    return b"".join(kept)


def refuse_twice(text: bytes, keys: int) -> None:
    """Refuses valid JSON that has a key twice in an object. keys: those of all its objects as a decoder counts them, of
    which the last one wins."""
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
        said = f"{name!r} holds more than {max_rows} rows of shape {list(shape)}: at most {max_rows} rows are taken"
        raise Refused(413, "too_many_rows", said)
    rows = (opened - 1) // row.count(b"[") if shape else commas + 1
    # without its values a body is brackets and commas, and which ones its shape says
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
    """The values, with commas between them, some thousands at a time."""
    start = 0
    while start < len(text):
        end = text.find(b",", start + PIECE)
        end = len(text) if end < 0 else end
        yield text[start:end].translate(None, b"[] \t\r\n")
        start = end + 1


def rows(text: bytes, columns: int, max_rows: int, build: Callable[[bytes, int], dict]) -> Iterator[list[dict]]:
    """Rows of a table, some at a time. build: a row, from its JSON and its number."""
    bare = outside_strings(text)
    objects, cells, commas = bare.count(b"{"), bare.count(b":"), bare.count(b",")
    if objects > max_rows:
        raise Refused(413, "too_many_rows", f"{objects} rows, at most {max_rows} are taken")
    # between cells and between rows there is a comma: more of them belong to something that is no row
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
