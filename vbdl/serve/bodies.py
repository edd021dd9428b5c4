"""Parsing of request bodies to inputs of a model; other bodies are refused with the reason."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import msgspec
import numpy as np
import torch
from torch import Tensor

from vbdl.artifact.manifest import InputEntry
from vbdl.artifact.manifest import Inputs as Signature
from vbdl.artifact.tensors import DTYPES
from vbdl.serve import arrow, counted, json_schema, npy
from vbdl.serve.arrays import NUMPY, check_finite, nested, tensor
from vbdl.serve.counted import LARGE, refuse_twice
from vbdl.serve.decoding import check_rows, decode
from vbdl.serve.json_schema import LARGEST, key_of
from vbdl.serve.limits import Refused
from vbdl.tabular import Schema
from vbdl.tabular.columns import Boolean, Categorical, Column, Date
from vbdl.tabular.schema import Encoded
from vbdl.types import Inputs

if TYPE_CHECKING:
    import pyarrow

_log = logging.getLogger(__name__)

Cell = float | int | bool | str | None
Row = dict[str, Cell]
Notes = dict[str, dict[str, int]]
"""{"imputed" or "unseen": {column: cells}}: missing cells, and categories that training did not have"""

Read = tuple[Inputs, int, Notes]
"""(inputs, rows, notes)"""


class _Rows(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[Row]


class _RawRows(msgspec.Struct, forbid_unknown_fields=True):
    rows: msgspec.Raw


class _Arrays(msgspec.Struct, forbid_unknown_fields=True):
    inputs: msgspec.Raw


_ROWS = msgspec.json.Decoder(_Rows)
_RAW_ROWS = msgspec.json.Decoder(_RawRows)
_ARRAYS = msgspec.json.Decoder(_Arrays)


class Bodies:
    """Parses the bodies of requests for one model: rows of a table by `schema`, or arrays by `inputs`."""

    def __init__(self, schema: Schema | None, inputs: Signature | None):
        self.schema, self.inputs = schema, inputs

    @property
    def entries(self) -> list[InputEntry]:
        """The descriptions of the input tensors of a model that was not trained on a table."""
        assert self.inputs is not None
        return self.inputs.tensors

    def together(self, tensors: list[Tensor]) -> Inputs:
        """Arrange the input tensors as the predictor takes them: one, a tuple, or a dict."""
        assert self.inputs is not None
        if self.inputs.layout == "tensor":
            return tensors[0]
        if self.inputs.layout == "positional":
            return tuple(tensors)
        return {key_of(i, e): t for i, (e, t) in enumerate(zip(self.entries, tensors, strict=True))}

    def read(self, media: str, body: bytes, max_rows: int) -> Read:
        """Parse a body: (inputs, rows, notes). Raises Refused with the reason if the model cannot take it."""
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
        except Exception as error:  # damaged bytes may make a parser raise any error, which is no error of the service
            _unforeseen(error)

    def _json(self, body: bytes, max_rows: int) -> Read:
        if self.schema is not None:
            return self._json_rows(self.schema, body, max_rows)
        try:
            return self._json_arrays(body, max_rows)
        except Refused as refused:
            if refused.code != "bad_body":
                raise
            message = f"{refused.message[:300]}. Send {self.wanted}"
        raise Refused(422, "bad_body", message)

    @property
    def wanted(self) -> str:
        """The body of a model that takes arrays, in words."""
        if self.inputs is not None and self.inputs.layout == "tensor":
            return f'{{"inputs": [row, ...]}}, each row {_shaped(self.entries[0])}'
        named = [(key_of(i, e), _shaped(e)) for i, e in enumerate(self.entries)]
        arrays = ", ".join(f'"{name}": [row, ...]' for name, _ in named)
        return f'{{"inputs": {{{arrays}}}}}, each row {", ".join(f"of {name!r} {shape}" for name, shape in named)}'

    def _json_arrays(self, body: bytes, max_rows: int) -> Read:
        entries, named = self.entries, self.inputs is not None and self.inputs.layout != "tensor"
        keys = 1 + len(entries) * named
        if len(body) > LARGE and body.count(b":") > keys:  # counted before an object of a million keys is built
            raise Refused(422, "bad_body", f"a body has {keys} keys, this one has more")
        request = decode(body, _ARRAYS)
        raws = {key_of(0, entries[0]): request.inputs}
        if named:
            raws = decode(request.inputs, dict[str, msgspec.Raw], "inputs: ")
        refuse_twice(body, 1 + len(raws) * named)
        names = [key_of(i, e) for i, e in enumerate(entries)]
        if sorted(raws) != sorted(names):
            raise Refused(422, "bad_body", f"inputs are {names}, got {sorted(raws)[:20]}")
        arrays = [nested(raws[name], e, name, max_rows) for name, e in zip(names, entries, strict=True)]
        return self._checked(arrays, max_rows)

    def _json_rows(self, schema: Schema, body: bytes, max_rows: int) -> Read:
        if len(body) <= LARGE:
            rows = decode(body, _ROWS).rows
            check_rows(len(rows), max_rows)
            refuse_twice(body, 1 + sum(map(len, rows)))
            return self._encoded(rows)
        parts: list[Encoded] = []
        keys = 1

        def build(row: bytes, number: int) -> Row:
            nonlocal keys
            cells = decode(row, Row, f"row {number}: ")
            refuse_twice(row, len(cells))
            keys += len(cells)
            return cells

        text = bytes(decode(body, _RAW_ROWS).rows)
        for rows in counted.rows(text, len(schema.columns), max_rows, build):
            parts.append(self._encode(rows, sum(len(part.x) for part in parts)))
        check_rows(sum(len(part.x) for part in parts), max_rows)
        refuse_twice(body, keys)
        return _accepted(_joined(parts))

    def _arrow(self, body: bytes, max_rows: int) -> Read:
        table = arrow.read(body, max_rows)
        check_rows(table.num_rows, max_rows)
        if self.schema is not None:
            return self._encoded(table)
        if len(self.entries) != 1 or len(self.entries[0].shape) != 1:
            raise Refused(415, "media_type", "a table is rows of numbers, and this model's rows are of another shape")
        width = self.entries[0].shape[0]
        if table.num_columns != width:
            raise Refused(422, "bad_body", f"the model takes {width} columns, the table has {table.num_columns}")
        dtype = DTYPES[self.entries[0].dtype]
        values = np.empty((table.num_rows, width), NUMPY.get(dtype, "f8"))
        for k, column in enumerate(table.columns):
            try:
                numbers = column.cast("float64").to_numpy()
            except Exception as error:  # Arrow's errors are of many kinds
                reason = (str(error).splitlines() or [""])[0]
                raise Refused(422, "bad_body", f"a column is not of numbers: {reason[:200]}") from None
            if dtype.is_floating_point:
                check_finite(numbers, self.entries[0].name or "0", dtype)
            values[:, k] = numbers
        return self._checked([values], max_rows)

    def _npy(self, body: bytes, max_rows: int) -> Read:
        if self.schema is not None or len(self.entries) != 1:
            raise Refused(
                415, "media_type", "an array has no names of columns or inputs: send JSON, or a table as Arrow"
            )
        array = npy.read(body, 1 + len(self.entries[0].shape))
        check_rows(len(array), max_rows)
        return self._checked([array], max_rows)

    def _encoded(self, rows: "list[Row] | pyarrow.Table") -> Read:
        return _accepted(self._encode(rows))

    def _encode(self, rows: "list[Row] | pyarrow.Table", first: int = 0) -> Encoded:
        """Encode the rows of a table as network inputs. first: the number of the first row."""
        assert self.schema is not None
        if isinstance(rows, list):
            self._strict(rows, first)
        try:
            encoded = self.schema.encode_rows(rows) if isinstance(rows, list) else self.schema.encode(rows)
        except ValueError as error:
            raise Refused(422, "bad_body", str(error)[:500]) from None
        encoded.rejected = {first + row: reason for row, reason in encoded.rejected.items()}
        return encoded

    def _strict(self, rows: list[Row], first: int) -> None:
        """Refuse values of other types than the OpenAPI description names; the schema is more tolerant, for files."""
        assert self.schema is not None
        kinds = {column.name: column for column in self.schema.columns}
        for number, row in enumerate(rows, first):
            for name, value in row.items():
                if name not in kinds:
                    raise Refused(422, "bad_row", f"row {number}: there is no column {name[:60]!r}")
                if value is not None and not _fits(value, kinds[name]):
                    wanted = json_schema.cell(kinds[name])["type"][0]
                    raise Refused(422, "bad_row", f"row {number}: column {name!r} takes a {wanted}, or null")

    def _checked(self, arrays: list[np.ndarray], max_rows: int) -> Read:
        rows = {len(a) for a in arrays}
        if len(rows) > 1:
            raise Refused(422, "bad_body", f"inputs have different numbers of rows: {sorted(rows)}")
        entries = zip(self.entries, arrays, strict=True)
        converted = [tensor(array, entry, key_of(index, entry)) for index, (entry, array) in enumerate(entries)]
        count = rows.pop()
        check_rows(count, max_rows)
        return self.together(converted), count, {}


def _shaped(entry: InputEntry) -> str:
    """The shape of a row of an input in words: "a number", or "an array of shape [1, 28, 28]"."""
    kind = "boolean" if DTYPES[entry.dtype] == torch.bool else "number"
    return f"an array of {kind}s of shape {list(entry.shape)}" if entry.shape else f"a {kind}"


def _unforeseen(error: Exception) -> NoReturn:
    """Refuse a body on which a parser raised an unforeseen error, and log it."""
    reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    _log.warning("a body was refused for a reason that was not foreseen: %s", reason)
    raise Refused(400, "bad_body", f"the body cannot be read ({reason})") from None


def _accepted(encoded: Encoded) -> Read:
    """Return (inputs, rows, notes) of an encoded table. Raises Refused if a row was rejected."""
    if encoded.rejected:
        row, reason = min(encoded.rejected.items())
        message = f"{len(encoded.rejected)} of {len(encoded.x)} rows: row {row}: {reason[:300]}"
        raise Refused(422, "bad_row", message)
    notes = {"imputed": encoded.imputed, "unseen": encoded.unseen}
    return encoded.x, len(encoded.x), {name: counts for name, counts in notes.items() if counts}


def _joined(parts: list[Encoded]) -> Encoded:
    """Concatenate the encoded pieces of one table."""
    if not parts:
        raise Refused(422, "no_rows", "there are no rows to predict")
    whole = Encoded(torch.cat([part.x for part in parts]))
    for part in parts:
        whole.rejected |= part.rejected
        for total, counts in ((whole.imputed, part.imputed), (whole.unseen, part.unseen)):
            for column, cells in counts.items():
                total[column] = total.get(column, 0) + cells
    return whole


def _fits(value: Cell, column: Column) -> bool:
    if isinstance(column, Boolean):
        return isinstance(value, bool)
    if isinstance(column, Date):
        return isinstance(value, str)
    if isinstance(column, Categorical):  # a category may be a number
        return isinstance(value, str) or (_number(value) and float(value).is_integer())
    if json_schema.written(column) and isinstance(value, str):
        return True
    return _number(value)


def _number(value: Cell) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
