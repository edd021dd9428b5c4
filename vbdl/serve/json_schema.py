"""JSON Schemas for the requests of a model: a row of a table, an array, a whole body."""

import datetime

import torch

from vbdl.artifact.manifest import InputEntry
from vbdl.artifact.manifest import Inputs as Signature
from vbdl.artifact.tensors import DTYPES
from vbdl.tabular import Schema
from vbdl.tabular.columns import Boolean, Categorical, Column, Date, Numeric
from vbdl.types import Json

LARGEST = 1e30  # largest number in a request: far enough below the largest float32 for a network to compute with


def cell(column: Column) -> Json:
    """The JSON Schema of a cell."""
    if isinstance(column, Boolean):
        return {"type": ["boolean", "null"]}
    if isinstance(column, Categorical):
        return {
            "type": ["string", "integer", "null"],
            "minimum": -LARGEST,
            "maximum": LARGEST,
            "examples": list(column.categories),
            "description": "the model knows: " + ", ".join(column.categories[:50]),
        }
    if isinstance(column, Date):
        # the median of the training rows in ISO format, which every order of day and month reads
        day = datetime.date(1970, 1, 1) + datetime.timedelta(days=round(column.fill))
        return {"type": ["string", "null"], "format": "date", "examples": [day.isoformat()]}
    kinds = ["number", "string", "null"] if written(column) else ["number", "null"]
    return {"type": kinds, "minimum": -LARGEST, "maximum": LARGEST, "examples": [round(column.mean, 4)]}


def written(column: Column) -> bool:
    """Whether a number may be given as text, in the notation of the training cells."""
    return isinstance(column, Numeric) and column.written is not None


def array(entry: InputEntry, name: str | None = None) -> Json:
    """The JSON Schema of a row of an input tensor."""
    dtype = DTYPES[entry.dtype]
    schema: Json
    if dtype.is_floating_point:
        schema = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
    elif dtype == torch.bool:
        schema = {"type": "boolean"}
    else:
        schema = {"type": "integer", "minimum": torch.iinfo(dtype).min, "maximum": torch.iinfo(dtype).max}
    for size in reversed(entry.shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return schema if name is None else {"title": name, **schema}


def key_of(index: int, entry: InputEntry) -> str:
    """The name of an input in bodies and messages: its keyword, or its position."""
    return str(index) if entry.name is None else entry.name


def row(schema: Schema) -> Json:
    """The JSON Schema of a row of a table."""
    return {
        "type": "object",
        "properties": {column.name: cell(column) for column in schema.columns},
        "required": schema.names,
        "additionalProperties": False,
    }


def body(schema: Schema | None, inputs: Signature | None, max_rows: int) -> Json:
    """The JSON Schema of the body of a request."""
    if schema is not None:
        rows = {"type": "array", "items": row(schema), "minItems": 1, "maxItems": max_rows}
        name, value = "rows", rows
    else:
        assert inputs is not None
        arrays = {
            key_of(i, e): {"type": "array", "items": array(e), "minItems": 1, "maxItems": max_rows}
            for i, e in enumerate(inputs.tensors)
        }
        name, value = "inputs", next(iter(arrays.values()))
        if inputs.layout != "tensor":
            value = {
                "type": "object",
                "properties": arrays,
                "required": list(arrays),
                "additionalProperties": False,
                "description": "arrays of the same number of rows",
            }
    return {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}
