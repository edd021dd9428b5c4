"""Bodies of requests to inputs of a model; whatever is none is refused with the reason."""

import io
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
from vbdl.serve import arrow, json_schema
from vbdl.serve.json_schema import LARGEST, key_of
from vbdl.serve.limits import Refused
from vbdl.tabular import Schema
from vbdl.tabular.columns import Boolean, Categorical, Column, Date
from vbdl.types import Inputs

_NUMPY = {torch.float16: "f2", torch.float32: "f4", torch.float64: "f8", torch.bfloat16: "f4"}


class _Rows(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[dict[str, float | int | bool | str | None]]


class _Arrays(msgspec.Struct, forbid_unknown_fields=True):
    inputs: msgspec.Raw


class Bodies:
    """Reads them for one model: rows of a table, by `schema`, or arrays, by `inputs`."""

    def __init__(self, schema: Schema | None, inputs: Signature | None):
        self.schema, self.inputs = schema, inputs
        self._decoder = msgspec.json.Decoder(_Rows if schema else _Arrays)

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
        return readers[media](body, max_rows)

    def _json(self, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        try:
            found = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise Refused(422, "bad_body", str(error)) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Refused(400, "bad_json", f"the body is not JSON: {error}") from None
        if isinstance(found, _Rows):
            _count(len(found.rows), max_rows)
            return self._encoded(found.rows, max_rows)
        entries = self.entries
        raws = {key_of(0, entries[0]): found.inputs}
        assert self.inputs is not None
        if self.inputs.layout != "tensor":
            raws = _decode(found.inputs, dict[str, msgspec.Raw], "inputs")
            names = [key_of(i, e) for i, e in enumerate(entries)]
            if sorted(raws) != sorted(names):
                raise Refused(422, "bad_body", f"inputs are {names}, got {sorted(raws)[:20]}")
        return self._checked(
            [_array(raws[key_of(i, e)], e, key_of(i, e), max_rows) for i, e in enumerate(entries)], max_rows
        )

    def _arrow(self, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        table = arrow.read(body, max_rows)
        _count(table.num_rows, max_rows)
        if self.schema is not None:
            return self._encoded(table, max_rows)
        if len(self.entries) != 1 or len(self.entries[0].shape) != 1:
            raise Refused(415, "media_type", "a table is rows of numbers, and this model's rows are of another shape")
        width = self.entries[0].shape[0]
        if table.num_columns != width:
            raise Refused(422, "bad_body", f"the model takes {width} columns, the table has {table.num_columns}")
        try:
            columns = [column.cast("float64").to_numpy() for column in table.columns]
        except (ValueError, TypeError, OSError) as error:  # Arrow's errors are of these kinds
            raise Refused(422, "bad_body", f"a column is not of numbers: {str(error)[:200]}") from None
        return self._checked([np.stack(columns, axis=1)], max_rows)

    def _npy(self, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        if self.schema is not None or len(self.entries) != 1:
            raise Refused(
                415, "media_type", "an array has no names of columns or inputs: send JSON, or a table as Arrow"
            )
        try:
            stream = io.BytesIO(body)
            version = np.lib.format.read_magic(stream)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in header:
                raise ValueError(f"version {version}")
            shape, fortran, dtype = header[version](stream)
        except (ValueError, EOFError, OSError, SyntaxError, RecursionError, MemoryError) as error:
            raise Refused(400, "bad_npy", f"the body is no .npy array: {str(error)[:200]}") from None
        if dtype.kind not in "fiub" or dtype.hasobject:
            raise Refused(422, "bad_body", f"an array of numbers is taken, not of {str(dtype)[:40]}")
        size = math.prod(shape) * dtype.itemsize
        if len(body) - stream.tell() != size:
            raise Refused(
                400, "bad_npy", f"an array {shape[:8]} of {dtype} takes {size} bytes, not {len(body) - stream.tell()}"
            )
        if not shape:
            raise Refused(422, "bad_body", "an array has rows first, this is one number")
        _count(shape[0], max_rows)
        array = np.frombuffer(body, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
        return self._checked([array], max_rows)

    def _encoded(self, rows: Any, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        assert self.schema is not None
        if isinstance(rows, list):
            self._strict(rows)
        try:
            encoded = self.schema.encode_rows(rows) if isinstance(rows, list) else self.schema.encode(rows)
        except ValueError as error:
            raise Refused(422, "bad_body", str(error)[:500]) from None
        if encoded.rejected:
            row, reason = min(encoded.rejected.items())
            raise Refused(
                422, "bad_row", f"{len(encoded.rejected)} of {len(encoded.x)} rows: row {row}: {reason[:300]}"
            )
        notes = {name: counts for name in ("imputed", "unseen") if (counts := getattr(encoded, name))}
        return encoded.x, len(encoded.x), notes

    def _strict(self, rows: list[dict[str, Any]]) -> None:
        """The types that the description promises: the schema itself is as tolerant as files need."""
        assert self.schema is not None
        kinds = {column.name: column for column in self.schema.columns}
        for number, row in enumerate(rows):
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
                # one pass: NaN fails the comparison too
                if array.size and not np.abs(array.astype(np.float64)).max() <= LARGEST:
                    raise Refused(422, "bad_body", f"{name!r} has a number that is not finite, or beyond {LARGEST:g}")
                found.append(torch.from_numpy(array.astype(_NUMPY[dtype])).to(dtype))
                continue
            if array.dtype.kind not in ("b" if dtype == torch.bool else "iu"):
                raise Refused(422, "bad_body", f"{name!r} holds {entry.dtype}, got {array.dtype}")
            whole = torch.from_numpy(array.astype(bool if dtype == torch.bool else np.int64))
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


def _decode(raw: msgspec.Raw | bytes, kind: Any, name: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise Refused(422, "bad_body", f"{name}: {error}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(400, "bad_json", f"the body is not JSON: {error}") from None


def _array(raw: msgspec.Raw, entry: InputEntry, name: str, max_rows: int) -> np.ndarray:
    """Nested arrays of one input, of exactly the depth of its rows; numbers, and no booleans or text for them."""
    dtype = DTYPES[entry.dtype]
    kind: Any
    kind, stored = (float, "f8") if dtype.is_floating_point else (bool, "?") if dtype == torch.bool else (int, "i8")
    for _ in range(len(entry.shape) + 1):
        kind = list[kind]
    found = _decode(raw, kind, name)
    _count(len(found), max_rows)
    try:
        return np.array(found, dtype=stored)
    except (ValueError, OverflowError, TypeError):
        raise Refused(
            422, "bad_body", f"rows of {name!r} have shape {entry.shape}: these are ragged, or too large"
        ) from None


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
