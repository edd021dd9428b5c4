"""Bodies of requests to inputs of a model; whatever is none is refused with the reason."""

import logging
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from vbdl.artefact.manifest import InputEntry
from vbdl.artefact.manifest import Inputs as Signature
from vbdl.artefact.tensors import DTYPES
from vbdl.serve import arrow, counted, json_schema, npy
from vbdl.serve.counted import LARGE, refuse_twice
from vbdl.serve.json_schema import LARGEST, key_of
from vbdl.serve.limits import Refused
from vbdl.tabular import Schema
from vbdl.tabular.columns import Boolean, Categorical, Column, Date
from vbdl.tabular.schema import Encoded
from vbdl.types import Inputs

_log = logging.getLogger(__name__)
_NUMPY = {torch.float16: "f2", torch.float32: "f4", torch.float64: "f8", torch.bfloat16: "f4"}


_Row = dict[str, float | int | bool | str | None]


class _Rows(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[_Row]


class _RawRows(msgspec.Struct, forbid_unknown_fields=True):
    rows: msgspec.Raw


class _Arrays(msgspec.Struct, forbid_unknown_fields=True):
    inputs: msgspec.Raw


class Bodies:
    """Reads them for one model: rows of a table, by `schema`, or arrays, by `inputs`."""

    def __init__(self, schema: Schema | None, inputs: Signature | None):
        self.schema, self.inputs = schema, inputs
        self._decoders = {kind: msgspec.json.Decoder(kind) for kind in (_Rows, _RawRows, _Arrays)}

    @property
    def entries(self) -> list[InputEntry]:
        """The tensors of a call, of a model that was not made from a table."""
        assert self.inputs is not None
        return self.inputs.tensors

    def together(self, found: list[Tensor]) -> Inputs:
        """These tensors as the predictor takes them."""
        assert self.inputs is not None
        if self.inputs.layout == "tensor":
            return found[0]
        if self.inputs.layout == "positional":
            return tuple(found)
        return {key_of(i, e): t for i, (e, t) in enumerate(zip(self.entries, found, strict=True))}

    def read(self, media: str, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        """(inputs, rows, notes). Refused, with the reason, for a body that is no table or array of its rows."""
        readers: dict[str, Callable] = {
            "application/json": self._json,
            "application/vnd.apache.arrow.stream": self._arrow,
            "application/x-npy": self._npy,
        }
        if media not in readers:
            raise Refused(415, "media_type", f"Content-Type is one of {', '.join(readers)}, got {media[:60]!r}")
        try:
            return readers[media](body, max_rows)
        except Refused:
            raise
        except Exception as error:  # a stranger's bytes: whatever they make a parser say, it is no failure of ours
            return _unforeseen(error)

    def _decode(self, body: bytes, kind: Any) -> Any:
        return _decode(body, kind, "", self._decoders[kind])

    def _json(self, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        if self.schema is not None:
            return self._json_rows(self.schema, body, max_rows)
        entries, named = self.entries, self.inputs is not None and self.inputs.layout != "tensor"
        keys = 1 + len(entries) * named
        if len(body) > LARGE and body.count(b":") > keys:  # before an object of a million keys is built
            raise Refused(422, "bad_body", f"a body has {keys} keys, this one has more")
        found = self._decode(body, _Arrays)
        raws = {key_of(0, entries[0]): found.inputs}
        if named:
            raws = _decode(found.inputs, dict[str, msgspec.Raw], "inputs: ")
        refuse_twice(body, 1 + len(raws) * named)
        names = [key_of(i, e) for i, e in enumerate(entries)]
        if sorted(raws) != sorted(names):
            raise Refused(422, "bad_body", f"inputs are {names}, got {sorted(raws)[:20]}")
        return self._checked(
            [_array(raws[name], e, name, max_rows) for name, e in zip(names, entries, strict=True)], max_rows
        )

    def _json_rows(self, schema: Schema, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        if len(body) <= LARGE:
            rows = self._decode(body, _Rows).rows
            _count(len(rows), max_rows)
            refuse_twice(body, 1 + sum(map(len, rows)))
            return self._encoded(rows)
        parts: list[Encoded] = []
        keys = 1

        def build(row: bytes, number: int) -> dict[str, Any]:
            nonlocal keys
            found = _decode(row, _Row, f"row {number}: ")
            refuse_twice(row, len(found))
            keys += len(found)
            return found

        text = bytes(self._decode(body, _RawRows).rows)
        for rows in counted.rows(text, len(schema.columns), max_rows, build):
            parts.append(self._encode(rows, sum(len(part.x) for part in parts)))
        _count(sum(len(part.x) for part in parts), max_rows)
        refuse_twice(body, keys)
        return _told(_joined(parts))

    def _arrow(self, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        table = arrow.read(body, max_rows)
        _count(table.num_rows, max_rows)
        if self.schema is not None:
            return self._encoded(table)
        if len(self.entries) != 1 or len(self.entries[0].shape) != 1:
            raise Refused(415, "media_type", "a table is rows of numbers, and this model's rows are of another shape")
        width = self.entries[0].shape[0]
        if table.num_columns != width:
            raise Refused(422, "bad_body", f"the model takes {width} columns, the table has {table.num_columns}")
        dtype = DTYPES[self.entries[0].dtype]
        values = np.empty((table.num_rows, width), _NUMPY.get(dtype, "f8"))
        for k, column in enumerate(table.columns):
            try:
                found = column.cast("float64").to_numpy()
            except Exception as error:  # Arrow's errors are of many kinds
                said = (str(error).splitlines() or [""])[0]
                raise Refused(422, "bad_body", f"a column is not of numbers: {said[:200]}") from None
            if dtype.is_floating_point:
                _finite(found, self.entries[0].name or "0", dtype)
            values[:, k] = found
        return self._checked([values], max_rows)

    def _npy(self, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        if self.schema is not None or len(self.entries) != 1:
            raise Refused(
                415, "media_type", "an array has no names of columns or inputs: send JSON, or a table as Arrow"
            )
        array = npy.read(body, 1 + len(self.entries[0].shape))
        _count(len(array), max_rows)
        return self._checked([array], max_rows)

    def _encoded(self, rows: Any) -> tuple[Inputs, int, dict[str, Any]]:
        return _told(self._encode(rows))

    def _encode(self, rows: Any, first: int = 0) -> Encoded:
        """A table as the network takes it. first: the number of its first row."""
        assert self.schema is not None
        if isinstance(rows, list):
            self._strict(rows, first)
        try:
            encoded = self.schema.encode_rows(rows) if isinstance(rows, list) else self.schema.encode(rows)
        except ValueError as error:
            raise Refused(422, "bad_body", str(error)[:500]) from None
        encoded.rejected = {first + row: reason for row, reason in encoded.rejected.items()}
        return encoded

    def _strict(self, rows: list[dict[str, Any]], first: int) -> None:
        """The types that the description promises: the schema itself is as tolerant as files need."""
        assert self.schema is not None
        kinds = {column.name: column for column in self.schema.columns}
        for number, row in enumerate(rows, first):
            for name, value in row.items():
                if name not in kinds:
                    raise Refused(422, "bad_row", f"row {number}: there is no column {name[:60]!r}")
                if value is not None and not _fits(value, kinds[name]):
                    wanted = json_schema.cell(kinds[name])["type"][0]
                    raise Refused(422, "bad_row", f"row {number}: column {name!r} takes a {wanted}, or null")

    def _checked(self, arrays: list[np.ndarray], max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        rows = {len(a) for a in arrays}
        if len(rows) > 1:
            raise Refused(422, "bad_body", f"inputs have different numbers of rows: {sorted(rows)}")
        found = []
        for index, (entry, array) in enumerate(zip(self.entries, arrays, strict=True)):
            name, dtype = key_of(index, entry), DTYPES[entry.dtype]
            if list(array.shape[1:]) != list(entry.shape):
                raise Refused(
                    422, "bad_body", f"a row of {name!r} has shape {entry.shape}, got {list(array.shape[1:])}"
                )
            if dtype.is_floating_point:
                step = max(1, 2**16 // max(1, math.prod(entry.shape)))  # without a copy of the whole in float64
                for start in range(0, len(array), step):
                    _finite(array[start : start + step].astype(np.float64), name, dtype)
                # what was read from JSON is of that type already; a body's own bytes are copied
                array = array.astype(_NUMPY[dtype], copy=not array.flags.writeable)
                found.append(torch.from_numpy(array).to(dtype))
                continue
            if array.dtype.kind not in ("b" if dtype == torch.bool else "iu"):
                raise Refused(422, "bad_body", f"{name!r} holds {entry.dtype}, got {array.dtype}")
            kind = bool if dtype == torch.bool else np.int64
            whole = torch.from_numpy(array.astype(kind, copy=not array.flags.writeable))
            if not torch.equal(whole.to(dtype).to(whole.dtype), whole):
                raise Refused(422, "bad_body", f"{name!r} holds {entry.dtype}, and a number is beyond it")
            found.append(whole.to(dtype))
        count = rows.pop()
        _count(count, max_rows)
        return self.together(found), count, {}


def _count(rows: int, max_rows: int) -> None:
    if rows == 0:
        raise Refused(422, "no_rows", "there are no rows to predict")
    if rows > max_rows:
        raise Refused(413, "too_many_rows", f"{rows} rows, at most {max_rows} are taken")


def _decode(raw: msgspec.Raw | bytes, kind: Any, name: str, decoder: Any = None) -> Any:
    """JSON of this kind; `name` begins what is said of another."""
    try:
        return msgspec.json.decode(raw, type=kind) if decoder is None else decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise Refused(422, "bad_body", f"{name}{error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(400, "bad_json", f"the body is not JSON: {error}") from None


def _unforeseen(error: Exception) -> Any:
    """Refuses a body on which something was raised that nobody thought of."""
    said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    _log.warning("a body was refused for a reason that was not foreseen: %s", said)
    raise Refused(400, "bad_body", f"the body cannot be read ({said})") from None


def _told(encoded: Encoded) -> tuple[Inputs, int, dict[str, Any]]:
    """Inputs, rows, and what is to be noted of a table; refused when one of its rows is."""
    if encoded.rejected:
        row, reason = min(encoded.rejected.items())
        said = f"{len(encoded.rejected)} of {len(encoded.x)} rows: row {row}: {reason[:300]}"
        raise Refused(422, "bad_row", said)
    notes = {name: counts for name in ("imputed", "unseen") if (counts := getattr(encoded, name))}
    return encoded.x, len(encoded.x), notes


def _joined(parts: list[Encoded]) -> Encoded:
    """Pieces of one table, one after the other."""
    if not parts:
        raise Refused(422, "no_rows", "there are no rows to predict")
    found = Encoded(torch.cat([part.x for part in parts]))
    for part in parts:
        found.rejected |= part.rejected
        for name in ("imputed", "unseen"):
            for column, cells in getattr(part, name).items():
                getattr(found, name)[column] = getattr(found, name).get(column, 0) + cells
    return found


def _array(raw: msgspec.Raw, entry: InputEntry, name: str, max_rows: int) -> np.ndarray:
    """Nested arrays of one input, of exactly the depth of its rows; numbers, and no booleans or text for them."""
    dtype = DTYPES[entry.dtype]
    kind: Any
    kind, stored = (float, "f8") if dtype.is_floating_point else (bool, "?") if dtype == torch.bool else (int, "i8")
    if memoryview(raw).nbytes > LARGE:

        def build(piece: bytes) -> np.ndarray:
            found = _stored(_decode(piece, list[kind], f"{name}: "), stored, entry, name)
            if dtype.is_floating_point:
                _finite(found, name, dtype)
            return found

        held = np.dtype(_NUMPY.get(dtype, stored))
        return counted.array(bytes(raw), tuple(entry.shape), held, max_rows, name, build)
    for _ in range(len(entry.shape) + 1):
        kind = list[kind]
    found = _decode(raw, kind, f"{name}: ")
    _count(len(found), max_rows)
    return _stored(found, stored, entry, name)


def _stored(found: list, stored: str, entry: InputEntry, name: str) -> np.ndarray:
    try:
        return np.array(found, dtype=stored)
    except (ValueError, OverflowError, TypeError):
        raise Refused(
            422, "bad_body", f"rows of {name!r} have shape {entry.shape}: these are ragged, or too large"
        ) from None


def _finite(numbers: np.ndarray, name: str, dtype: torch.dtype) -> None:
    """Refuses numbers that are not finite, or that the dtype does not hold with room for a network."""
    largest = float(np.float32(min(LARGEST, torch.finfo(dtype).max)))  # as float32 rounds it, which may be up
    # one pass: NaN fails the comparison too
    if numbers.size and not np.abs(numbers).max() <= largest:
        raise Refused(422, "bad_body", f"{name!r} has a number that is not finite, or beyond {largest:g}")


def _fits(value: Any, column: Column) -> bool:
    if isinstance(column, Boolean):
        return isinstance(value, bool)
    if isinstance(column, Date):
        return isinstance(value, str)
    if isinstance(column, Categorical):  # a code is a word too
        return isinstance(value, str) or (_number(value) and float(value).is_integer())
    if json_schema.written(column) and isinstance(value, str):
        return True
    return _number(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
