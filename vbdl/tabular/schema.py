"""The schema of a table's model: its columns, how their cells are encoded as numbers, and its target.

    schema, report = infer(table, "price", training_rows)
    encoded = schema.encode(table)           # an Arrow table (other columns are ignored)
    encoded = schema.encode_rows([{"age": 31, "city": "Porto"}])     # rows as dicts, from JSON for instance
    encoded.x                                # (rows, features) float32, what the network is called with
    encoded.rejected                         # {row: reason}; these rows of x hold zeros and mean nothing
    schema.tensor(rows_or_table)             # encoded.x, or ValueError if any row is rejected
    schema.to_dict(), Schema.from_dict(d)    # JSON, stored in the artifact under "table"

Both ways give the same numbers bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import Tensor

from vbdl.tabular.cells import Unreadable, plain
from vbdl.tabular.columns import Categorical, Column, Date, Numeric
from vbdl.tabular.reading import NULLS, Reading, as_table
from vbdl.tabular.target import Target
from vbdl.types import Json

FORMAT = 1
KEY = "table"  # key of the schema in an artifact's extras


@dataclass
class Encoded:
    """Encoded rows: the inputs of the network, the rejected rows, and counts of unusual cells by column."""

    x: Tensor  # (rows, features) float32
    rejected: dict[int, str] = field(default_factory=dict)  # row number -> reason; the row of x is zero
    unseen: dict[str, int] = field(default_factory=dict)  # column -> cells with a category unknown to training
    imputed: dict[str, int] = field(default_factory=dict)  # column -> missing cells
    filled: dict[str, int] = field(default_factory=dict)  # column -> missing cells, if training had none

    @property
    def kept(self) -> Tensor:
        """(rows,) bool, whether the row could be read."""
        readable = torch.ones(len(self.x), dtype=torch.bool)
        readable[list(self.rejected)] = False
        return readable


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Input columns in the order of the network's inputs, and the target.

    reading: options for reading files; None in older models, which did not store them.
    """

    columns: tuple[Column, ...]
    target: Target
    format: int = FORMAT
    reading: Reading | None = None

    @property
    def features(self) -> list[str]:
        """The names of the network's inputs."""
        return [feature for column in self.columns for feature in column.features]

    @property
    def names(self) -> list[str]:
        """The names of the columns that a table or a row must have."""
        return [column.name for column in self.columns]

    @property
    def worded(self) -> list[str]:
        """The columns that are read as text from files without types: categories, and numbers in a special notation."""
        return [c.name for c in self.columns if isinstance(c, Categorical) or _written(c)]

    @property
    def files(self) -> Reading:
        """The options for reading files for this model."""
        if self.reading is None:
            return Reading()
        target = (self.target.name,) if self.target.written else ()
        return msgspec.structs.replace(self.reading, text=(*self.worded, *target))

    def to_dict(self) -> Json:
        """Return the schema as a dict for JSON."""
        description = msgspec.json.decode(msgspec.json.encode(self))
        return {key: value for key, value in description.items() if key != "reading" or value is not None}

    @classmethod
    def from_dict(cls, description: object) -> "Schema":
        """Return the schema in a dict from JSON. Raises ValueError if it is no schema, or has another format."""
        try:
            schema = msgspec.convert(description, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"this is not a table's schema: {error}") from error
        if schema.format != FORMAT:
            raise ValueError(f"the table's schema has format {schema.format}, this vbdl reads {FORMAT}")
        if not schema.columns:
            raise ValueError("the table's schema has no column")
        return schema

    # -- rows to numbers

    def encode(self, data: object) -> Encoded:
        """Encode a table of any form that `as_table` takes. Raises ValueError if a column is missing or its type cannot
        be read; a cell that cannot be read only rejects its row."""
        table = as_table(data, self.files)
        there = set(table.column_names)
        absent = [name for name in self.names if name not in there]
        if absent:
            raise ValueError(
                f"the table has no column {absent[0]!r}; the model needs {self.names}, there are {table.column_names}"
            )
        encoded = Encoded(torch.empty(0, len(self.features)))
        values = np.empty((table.num_rows, len(self.features)), np.float32)
        at = 0
        for column in self.columns:
            block = column.encode(table.column(column.name))
            with np.errstate(over="ignore"):
                values[:, at : at + block.values.shape[1]] = block.values
            at += block.values.shape[1]
            self._note(encoded, column, block.missing, block.unseen)
            for row, reason in block.rejected.items():
                encoded.rejected.setdefault(row, reason)
        self._finish(encoded, values)
        return encoded

    def encode_rows(self, rows: Sequence[Mapping[str, object]]) -> Encoded:
        """Encode rows that are dicts by column name of numbers, booleans, text, or None for a missing cell. Types are
        strict: a number as text rejects its row, and so does a missing column. Arrow is not needed."""
        encoded = Encoded(torch.empty(0, len(self.features)))
        width = len(self.features)
        values: list[list[float]] = []
        for number, row in enumerate(rows):
            numbers: list[float] = []
            try:
                if not isinstance(row, Mapping):
                    raise Unreadable(f"a row is an object of columns by name, got {type(row).__name__}")
                for column in self.columns:
                    if column.name not in row:
                        raise Unreadable(f"column {column.name!r} is not given (null where it is not known)")
                    value = plain(row[column.name])
                    numbers += column.cell(value)
                    missing = column.is_missing(value)
                    unseen = isinstance(column, Categorical) and not missing and not column.knows(value)
                    self._note(encoded, column, int(missing), int(unseen))
            except Unreadable as error:
                encoded.rejected[number] = str(error)
                numbers = [0.0] * width
            values.append(numbers)
        with np.errstate(over="ignore"):
            array = np.array(values, np.float64).reshape(len(values), width).astype(np.float32)
        self._finish(encoded, array)
        return encoded

    def tensor(self, data: object) -> Tensor:
        """Encode a table or rows as dicts as (rows, features). Raises ValueError if a row cannot be read."""
        if isinstance(data, Sequence) and not isinstance(data, str):
            encoded = self.encode_rows(data)
        else:
            encoded = self.encode(data)
        if encoded.rejected:
            row, reason = min(encoded.rejected.items())
            raise ValueError(f"{len(encoded.rejected)} of {len(encoded.x)} rows cannot be read; row {row}: {reason}")
        return encoded.x

    def example(self) -> Tensor:
        """Return one row (1, features) of missing and unknown cells, for warming up a predictor."""
        row = {c.name: "" if isinstance(c, Categorical) else None for c in self.columns}
        return self.encode_rows([row]).x

    def _note(self, encoded: Encoded, column: Column, missing: int, unseen: int) -> None:
        if missing:
            for counts in (encoded.imputed,) if column.indicator else (encoded.imputed, encoded.filled):
                counts[column.name] = counts.get(column.name, 0) + missing
        if unseen:
            encoded.unseen[column.name] = encoded.unseen.get(column.name, 0) + unseen

    def _finish(self, encoded: Encoded, values: np.ndarray) -> None:
        """Store the values, and reject the rows with a number that float32 cannot hold."""
        for row in encoded.rejected:
            values[row] = 0.0
        finite = np.isfinite(values)
        if not finite.all():
            features = self.features
            for row in np.flatnonzero(~finite.all(axis=1)).tolist():
                which = features[int(np.flatnonzero(~finite[row])[0])]
                encoded.rejected[row] = f"column {which!r}: too large, {values[row][~finite[row]][0]} after scaling"
                values[row] = 0.0
        encoded.x = torch.from_numpy(values)

    def __str__(self) -> str:
        lines = []
        for c in self.columns:
            if isinstance(c, Categorical):
                shown = ", ".join(c.categories[:6]) + (", ..." if len(c.categories) > 6 else "")
                statistics = f"{len(c.categories)} categories: {shown}"
            else:
                unit = " days since 1970" if isinstance(c, Date) else ""
                statistics = f"mean {c.mean:.4g}, std {c.std:.4g}{unit}"
            kind = type(c).__name__.lower()
            lines.append(f"  {c.name:24s} {kind:12s} {statistics}{', missing cells' if c.indicator else ''}")
        return "\n".join(["inputs:", *lines, f"target: {self.target}"])


def _written(column: Column) -> bool:
    """Whether a column writes numbers or missing cells in a way that a CSV reader does not know."""
    return isinstance(column, Numeric) and (column.written is not None or column.missing != tuple(NULLS))
