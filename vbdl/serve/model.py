"""An artefact as the service needs it: bodies to inputs, predictions to answers, and a description of both."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from vbdl import tabular
from vbdl.adaptive import step_size
from vbdl.artefact.files import locate, read_whole
from vbdl.artefact.loading import load
from vbdl.artefact.manifest import CARD, InputEntry
from vbdl.artefact.tensors import DTYPES
from vbdl.serve import arrow
from vbdl.serve.limits import Refused
from vbdl.tabular.columns import Boolean, Categorical, Column, Date
from vbdl.types import Inputs

LARGEST = 1e30  # of a number in a request: what float32 holds with room for a network
_NUMPY = {torch.float16: "f2", torch.float32: "f4", torch.float64: "f8", torch.bfloat16: "f4"}


class _Rows(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[dict[str, float | int | bool | str | None]]


class _Arrays(msgspec.Struct, forbid_unknown_fields=True):
    inputs: msgspec.Raw


class Model:
    """A predictor, what its inputs are called, and what its outputs mean.

    settings: of vbdl.load (trust, tiles, device, compile, ...). ValueError for an artefact that does not say what its
    inputs look like.
    """

    def __init__(self, folder: str | Path, **settings: Any):
        self.name = Path(folder).resolve().name
        self.predictor = load(folder, **settings)
        self.manifest = self.predictor.manifest
        self.schema = tabular.schema_of(self.manifest.extras)
        if self.schema is None and self.manifest.inputs is None:
            raise ValueError(f"{folder} does not say what a row looks like: save it with save(folder, example=x)")
        card = locate(Path(folder)).get(CARD)
        self.card = "" if card is None else read_whole(card, 2**20).decode("utf-8", "replace")
        self.classes = self._classes()
        self._decoder = msgspec.json.Decoder(_Rows if self.schema else _Arrays)

    def _classes(self) -> list[Any] | None:
        target = self.schema.target if self.schema else None
        if target is None or target.classes is None:
            return None
        return [target.label(k) for k in range(len(target.classes))]

    # -- what a row looks like

    @property
    def entries(self) -> list[InputEntry]:
        """The tensors of a call, of a model that was not made from a table."""
        return self.manifest.inputs.tensors

    def example(self) -> Inputs:
        """One row that can be predicted, of no meaning."""
        if self.schema is not None:
            return self.schema.example()
        zeros = [torch.zeros(1, *entry.shape, dtype=DTYPES[entry.dtype]) for entry in self.entries]
        return self._together(zeros)

    def _together(self, found: list[Tensor]) -> Inputs:
        layout = self.manifest.inputs.layout
        if layout == "tensor":
            return found[0]
        return (
            tuple(found) if layout == "positional" else {_key(i, e): t for i, (e, t) in enumerate(self._pairs(found))}
        )

    def _pairs(self, found: list[Tensor]) -> list[tuple[InputEntry, Tensor]]:
        return list(zip(self.entries, found, strict=True))

    @property
    def anytime(self) -> bool:
        """Whether there are so many draws that a deadline can be met with fewer of them."""
        return step_size(self.predictor.n_samples) < self.predictor.n_samples

    def warm_up(self) -> None:
        """Compile what every batch needs, and every deadline; nothing is compiled afterwards."""
        self.predictor.warm_up(self.predictor.tiles, example=self.example(), adaptive=self.anytime)

    # -- bodies to inputs: (inputs, rows, notes)

    def read(self, media: str, body: bytes, max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        """Refused for a body that is not a table or array of rows this model takes, with the reason."""
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
        raws = {_key(0, entries[0]): found.inputs}
        if self.manifest.inputs.layout != "tensor":
            raws = _decode(found.inputs, dict[str, msgspec.Raw], "inputs")
            names = [_key(i, e) for i, e in enumerate(entries)]
            if sorted(raws) != sorted(names):
                raise Refused(422, "bad_body", f"inputs are {names}, got {sorted(raws)[:20]}")
        return self._checked(
            [_array(raws[_key(i, e)], e, _key(i, e), max_rows) for i, e in enumerate(entries)], max_rows
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
                    wanted = _kind(kinds[name])["type"][0]
                    raise Refused(422, "bad_row", f"row {number}: column {name!r} takes a {wanted}, or null")

    def _checked(self, arrays: list[np.ndarray], max_rows: int) -> tuple[Inputs, int, dict[str, Any]]:
        rows = {len(a) for a in arrays}
        if len(rows) > 1:
            raise Refused(422, "bad_body", f"inputs have different numbers of rows: {sorted(rows)}")
        found = []
        for index, (entry, array) in enumerate(zip(self.entries, arrays, strict=True)):
            name, dtype = _key(index, entry), DTYPES[entry.dtype]
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
        return self._together(found), count, {}

    # -- predictions to answers

    def answer(self, prediction: Any, notes: dict[str, Any]) -> dict[str, Any]:
        """One object a row, numbers only where they are finite (null: infinite, or not known)."""
        columns: dict[str, list] = {}
        classes = self.classes
        probs = getattr(prediction, "probs", None)
        for name in ("probs", "mean", "std", "confidence", *_FIELDS):
            value = getattr(prediction, name, None)
            if isinstance(value, Tensor) and not (name == "mean" and probs is not None):
                columns[name] = _single(value).tolist()
        if probs is not None:
            label = prediction.label
            numbers = label.tolist()
            columns["label"] = [classes[int(k)] for k in numbers] if classes and label.ndim == 1 else numbers
        if "sets" in columns:
            columns["sets"] = [
                [classes[k] if classes else k for k, inside in enumerate(row) if inside] for row in columns["sets"]
            ]
        names = list(columns)
        predictions = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        found: dict[str, Any] = {"predictions": predictions, "n_samples": _counts(prediction)}
        if self.classes is not None:
            found["classes"] = self.classes
        return found | ({"notes": notes} if notes else {})

    def columns(self, prediction: Any) -> dict[str, Any]:
        """Arrow arrays by name, as `vbdl predict` writes them, and the number of draws."""
        import pyarrow as pa

        from vbdl.batch.output import fields

        counts = np.broadcast_to(np.asarray(_counts(prediction), np.int64), len(prediction.total))
        return {**fields(prediction, self.classes, None, 0), "n_samples": pa.array(counts)}

    # -- descriptions

    def about(self) -> dict[str, Any]:
        """The model card, for programs and for people."""
        m = self.manifest
        return {
            "name": self.name,
            "method": type(m.posterior).__name__,
            "likelihood": m.likelihood.get("class"),
            "n_samples": self.predictor.n_samples,
            "tiles": list(self.predictor.tiles),
            "seed": self.predictor.seed,
            "versions": msgspec.to_builtins(m.versions),
            "classes": self.classes,
            "target": None if self.schema is None else self.schema.target.name,
            "row": self.row_schema() if self.schema else None,
            "inputs": None if self.schema else [_array_schema(e, name=_key(i, e)) for i, e in enumerate(self.entries)],
            "layout": "rows" if self.schema else m.inputs.layout,
            "training_rows": m.training_rows,
            "metrics": m.metrics,
            "card": self.card,
        }

    def row_schema(self) -> dict[str, Any]:
        """JSON Schema of a row, of a model that was made from a table."""
        assert self.schema is not None
        return {
            "type": "object",
            "properties": {column.name: _kind(column) for column in self.schema.columns},
            "required": self.schema.names,
            "additionalProperties": False,
        }

    def body_schema(self, max_rows: int) -> dict[str, Any]:
        """JSON Schema of the body of a request."""
        if self.schema is not None:
            rows = {"type": "array", "items": self.row_schema(), "minItems": 1, "maxItems": max_rows}
            name, value = "rows", rows
        else:
            arrays = {
                _key(i, e): {"type": "array", "items": _array_schema(e), "minItems": 1, "maxItems": max_rows}
                for i, e in enumerate(self.entries)
            }
            name, value = "inputs", next(iter(arrays.values()))
            if self.manifest.inputs.layout != "tensor":
                value = {
                    "type": "object",
                    "properties": arrays,
                    "required": list(arrays),
                    "additionalProperties": False,
                    "description": "arrays of the same number of rows",
                }
        return {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}


_FIELDS = ("total", "aleatoric", "epistemic", "standard_error", "lower", "upper", "sets", "action", "risk", "var", "es")


def _counts(prediction: Any) -> int | list[int]:
    """Draws that each row is based on, one number where they are as many for all."""
    counts = prediction.n_samples
    return counts.tolist() if isinstance(counts, Tensor) else counts


def _single(t: Tensor) -> Tensor:
    """(batch, 1) as (batch,): a regression of one output is one number."""
    return t.squeeze(1) if t.ndim == 2 and t.shape[1] == 1 else t


def _count(rows: int, max_rows: int) -> None:
    if rows == 0:
        raise Refused(422, "no_rows", "there are no rows to predict")
    if rows > max_rows:
        raise Refused(413, "too_many_rows", f"{rows} rows, at most {max_rows} are taken")


def _key(index: int, entry: InputEntry) -> str:
    """What an input is called in a body, and in what is said of it: its keyword, or its position."""
    return str(index) if entry.name is None else entry.name


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
    return _number(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _kind(column: Column) -> dict[str, Any]:
    """JSON Schema of a cell."""
    if isinstance(column, Boolean):
        return {"type": ["boolean", "null"]}
    if isinstance(column, Categorical):
        said = "the model knows: " + ", ".join(column.categories[:50])
        span = {"minimum": -LARGEST, "maximum": LARGEST}
        return {"type": ["string", "integer", "null"], **span, "examples": list(column.categories), "description": said}
    if isinstance(column, Date):
        return {"type": ["string", "null"], "format": "date", "examples": ["2026-01-31"]}
    return {"type": ["number", "null"], "minimum": -LARGEST, "maximum": LARGEST, "examples": [round(column.mean, 4)]}


def _array_schema(entry: InputEntry, name: str | None = None) -> dict[str, Any]:
    """JSON Schema of a row of a tensor."""
    dtype = DTYPES[entry.dtype]
    found: dict[str, Any]
    if dtype.is_floating_point:
        found = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
    elif dtype == torch.bool:
        found = {"type": "boolean"}
    else:
        found = {"type": "integer", "minimum": torch.iinfo(dtype).min, "maximum": torch.iinfo(dtype).max}
    for size in reversed(entry.shape):
        found = {"type": "array", "items": found, "minItems": size, "maxItems": size}
    return found if name is None else {"title": name, **found}
