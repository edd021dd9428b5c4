"""What is done to a chunk of rows, wherever it is done: rows to numbers, numbers to a prediction, and to columns."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vbdl.artefact.loading import load
from vbdl.artefact.tensors import DTYPES
from vbdl.batch.keeping import as_settled
from vbdl.batch.output import COLUMNS, fields
from vbdl.batch.sources import Chunk, ImageRow, one_line
from vbdl.engine import Predictor
from vbdl.stacking import map_inputs, tensors
from vbdl.tabular import Schema, schema_of
from vbdl.tabular.cells import combined, floats
from vbdl.tabular.reading import arrow


@dataclass(frozen=True)
class Options:
    """What is asked of a job, beside its model and its rows.

    columns: of the output, see `vbdl.batch.output`; keep: input columns to carry over. interval: level of `lower` and
    `upper` in place of the calibrated ones. inputs: columns of a model that was not made from a table, in the order of
    its inputs. tile: rows that are computed together; results do not depend on it but for rounding, and not at all on
    chunk_rows and workers. compile: None compiles where the input is large.
    """

    columns: tuple[str, ...] | None = None
    keep: tuple[str, ...] = ()
    interval: float = 0.0
    inputs: tuple[str, ...] | None = None
    tile: int = 256
    compile: bool | None = None
    chunk_rows: int = 65_536
    trust: tuple[str, ...] = ()  # packages that the model may import its network from

    def __post_init__(self):
        if self.tile < 1 or (self.tile > 1 and self.tile % 64):
            raise ValueError(
                f"tile is 1 or a multiple of 64, so that no row depends on its neighbours; got {self.tile}"
            )
        if unknown := [name for name in self.columns or () if name not in COLUMNS]:
            raise ValueError(f"there is no output column {unknown[0]!r}; there are {', '.join(COLUMNS)}")
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is at least 1, got {self.chunk_rows}")
        if not 0.0 <= self.interval < 1.0:
            raise ValueError(f"interval is a level in (0, 1), or 0 for none; got {self.interval}")


class Misfit(ValueError):
    """Why a source is nothing for the model: its columns, or what they hold."""


@dataclass
class Cells:
    """How many cells of a column, by its name, are not what training had."""

    unseen: dict[str, int] = field(default_factory=dict)  # a category that training did not have
    filled: dict[str, int] = field(default_factory=dict)  # missing, where training had none missing


@dataclass
class Result:
    """A chunk's output, in the order of its rows, and the rows that are not in it."""

    table: Any  # pyarrow.Table
    rejected: list[tuple[int, str]]  # (row number, reason), ascending
    cells: Cells


class Worker:
    """A predictor that takes chunks. It may be shared by threads.

    workers: how many share out a chunk's rows. kept: Arrow types of the input columns in the output.
    """

    def __init__(
        self,
        model: Any,
        options: Options,
        schema: Schema | None,
        workers: int = 1,
        kept: Mapping[str, Any] | None = None,
    ):
        self.options, self.schema, self._kept = options, schema, kept or {}
        settings = {"tiles": (options.tile,), "compile": bool(options.compile)}
        if isinstance(model, Predictor):
            self.predictor = model.replace(**settings)
            self._shape = _row_shape(model)
        else:
            self.predictor = load(model, trust=options.trust, **settings)
            self._shape = _row_shape(self.predictor)
            self.schema = self.schema or schema_of(self.predictor.manifest.extras)
        target = None if self.schema is None else self.schema.target
        named = target is not None and target.classes is not None
        self.labels = [target.label(i) for i in range(len(target.classes))] if named else None  # type: ignore[union-attr, arg-type]
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None
        self._workers = workers
        self._known: Any = None  # a row that the model has predicted

    @property
    def needed(self) -> list[str] | None:
        """Columns of a table that are read; None for all, where they are not known before one is seen."""
        if self.schema is not None:
            return list(dict.fromkeys([*self.schema.names, *self.options.keep]))
        if self.options.inputs is not None:
            return list(dict.fromkeys([*self.options.inputs, *self.options.keep]))
        return None

    def compute(self, chunk: Chunk) -> Result:
        """Misfit where the chunk's source is not of the model's kind, ValueError for what all sources would meet."""
        pa = arrow()
        try:
            x, bad, cells = self.encode(chunk.data)
        except (ValueError, pa.ArrowException) as error:
            raise Misfit(str(error)) from error
        rejected = [*chunk.rejected, *((int(chunk.rows[row]), reason) for row, reason in bad.items())]
        keep = np.ones(len(chunk.rows), dtype=bool)
        keep[list(bad)] = False
        if bad:
            x = map_inputs(lambda t: t[torch.from_numpy(keep)], x)
        columns, without = self._predict(x, int(keep.sum()))
        if without:
            numbers = np.flatnonzero(keep)
            rejected += [(int(chunk.rows[numbers[r]]), reason) for r, reason in without.items()]
            keep[numbers[list(without)]] = False
        found = {"row_id": pa.array(chunk.rows[keep])}
        if self.options.keep:
            kept = chunk.data.filter(pa.array(keep))
            for name in self.options.keep:
                if name in found or name in columns:
                    raise ValueError(f"column {name!r} would stand in the output twice: rename it in the input")
                try:
                    found[name] = as_settled(kept.column(name), name, self._kept)
                except (KeyError, pa.ArrowException) as error:
                    raise Misfit(f"column {name!r} cannot be kept: {one_line(error)}") from error
        return Result(pa.table({**found, **columns}), sorted(rejected), cells)

    def encode(self, data: Any) -> tuple[Any, dict[int, str], Cells]:
        """Rows as the network takes them, {row: reason} of those it cannot take, and cells that training had not."""
        if not hasattr(data, "column_names"):
            return data, _not_finite(data), Cells()
        if self.schema is not None:
            encoded = self.schema.encode(data)
            return encoded.x, encoded.rejected, Cells(encoded.unseen, encoded.filled)
        names = self._inputs(data)
        if len(names) == 1 and arrow().types.is_fixed_size_list(data.schema.field(names[0]).type):
            values, rejected = _vectors(data.column(names[0]), names[0])
        else:
            values, rejected = _matrix(data, names)
        if self._shape is not None and len(self._shape) == 1 and values.shape[1] != self._shape[0]:
            raise ValueError(
                f"the model takes rows of {self._shape[0]} numbers, and there are {values.shape[1]} columns of numbers "
                f"({', '.join(names[:6])}{', ...' if len(names) > 6 else ''}): name them with inputs"
            )
        return torch.from_numpy(values), rejected, Cells()

    def _inputs(self, table: Any) -> list[str]:
        if self.options.inputs is not None:
            return list(self.options.inputs)
        types = arrow().types
        lists = [f.name for f in table.schema if types.is_fixed_size_list(f.type)]
        numbers = [
            f.name
            for f in table.schema
            if f.name not in self.options.keep and (types.is_integer(f.type) or types.is_floating(f.type))
        ]
        if len(lists) == 1 and (self._shape is None or table.schema.field(lists[0]).type.list_size == self._shape[0]):
            return lists
        if not numbers:
            raise ValueError(f"there is no column of numbers among {table.column_names}")
        return numbers

    def _predict(self, x: Any, n: int) -> tuple[dict[str, Any], dict[int, str]]:
        """Columns of these rows, and {row: reason} of those that have none. Rows are shared out to the threads in whole
        tiles, so that each is computed as it would be alone."""
        if n == 0 and self._known is not None:
            x = _rows(self._known, 0, 0)
        elif n == 0 and self._shape is not None:
            x = torch.zeros(0, *self._shape, dtype=self._dtype())
        elif n == 0 and tensors(x)[0].ndim < 2:  # no row has said what a row is
            return {}, {}
        tile = self.options.tile
        each = max(tile, -(-n // tile // self._workers) * tile) if self._pool is not None else max(n, 1)
        cuts = range(0, max(n, 1), each)
        pieces = [_rows(x, start, start + each) for start in cuts]
        made = list(self._pool.map(self._piece, pieces)) if self._pool is not None else [self._piece(p) for p in pieces]
        tables = [columns for columns, _ in made if columns is not None]
        if not tables:  # the columns of no row
            some = self._columns(_rows(x, 0, 0) if self._known is None else self._known)[0]
            tables = [{name: column.slice(0, 0) for name, column in some.items()}]
        columns = {name: _joined([t[name] for t in tables]) for name in tables[0]}
        without: dict[int, str] = {}
        for start, (_, reasons) in zip(cuts, made, strict=True):
            without |= {start + row: reason for row, reason in reasons.items()}
        return columns, without

    def _piece(self, x: Any) -> tuple[dict[str, Any] | None, dict[int, str]]:
        """Columns of these rows (None where no row has any), and {row: reason} of those without.

        Where the model raises, halves are tried, and halves of those, until the rows it raises on are alone. No row's
        numbers depend on what is computed beside it, so the others' are what they would have been.
        """
        try:
            return self._columns(x)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # networks raise in many ways
            n = _length(x)
            if n == 0 or not self._works(x):
                raise  # not for what is in a row
            if n == 1:
                return None, {0: f"the model raised {type(error).__name__}: {_first_line(error)}"}
        half = n // 2
        one, other = self._piece(_rows(x, 0, half)), self._piece(_rows(x, half, n))
        tables = [columns for columns, _ in (one, other) if columns is not None]
        columns = {name: _joined([t[name] for t in tables]) for name in tables[0]} if tables else None
        return columns, {**one[1], **{half + row: reason for row, reason in other[1].items()}}

    def _columns(self, x: Any) -> tuple[dict[str, Any], dict[int, str]]:
        p = self.predictor(x, samples=self.options.interval > 0)
        if self._known is None and _length(x):
            self._known = map_inputs(lambda t: t[:1].clone(), x)
        columns = fields(p, self.labels, self.options.columns, self.options.interval)
        total = p.total.flatten(1).sum(1) if p.total.ndim > 1 else p.total
        if bool(torch.isfinite(total.sum())) or bool((finite := torch.isfinite(total)).all()):
            return columns, {}
        kept = arrow().array(finite.cpu().numpy())
        without = dict.fromkeys((~finite).nonzero().flatten().tolist(), "the prediction is not finite")
        return {name: column.filter(kept) for name, column in columns.items()}, without

    def _works(self, x: Any) -> bool:
        """Whether the model predicts at all: a row that it has predicted before, or else zeros or some row of these."""
        middle = _length(x) // 2
        found = [(0, 0), (0, 1), (middle, middle + 1)]
        for row in [self._known] if self._known is not None else [_rows(x, a, b) for a, b in found]:
            try:
                self._columns(row)
            except Exception:
                continue
            return True
        return False

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.predictor.posterior.parameters() if p.is_floating_point()), torch.float32)


def _rows(x: Any, start: int, end: int) -> Any:
    return map_inputs(lambda t: t[start:end], x)


def _length(x: Any) -> int:
    return len(tensors(x)[0])


def _first_line(error: Exception) -> str:
    """What was wrong, without the place in compiled code, which another machine has elsewhere."""
    line = next(iter(str(error).strip().splitlines()), "")
    return re.sub(r"^kernel, \S+:\d+, ", "", line)[:200]


def _joined(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else arrow().concat_arrays(arrays)


def _row_shape(predictor: Predictor) -> tuple[int, ...] | None:
    """The shape of a row of the network's one input, where an artefact says it."""
    inputs = None if predictor.manifest is None else predictor.manifest.inputs
    if inputs is None or len(inputs.tensors) != 1:
        return None
    return tuple(inputs.tensors[0].shape)


def _not_finite(x: Any) -> dict[int, str]:
    found: dict[int, str] = {}
    for t in tensors(x):
        if t.is_floating_point() and not bool(torch.isfinite(t.sum())):
            ok = t.flatten(1).isfinite().all(1) if t.ndim > 1 else t.isfinite()
            found |= {int(row): "the row is not finite" for row in (~ok).nonzero().flatten()}
    return found


def _matrix(table: Any, names: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """(rows, columns) float32, zeros in rows that cannot be used."""
    columns = np.empty((len(names), table.num_rows), np.float32)
    rejected: dict[int, str] = {}
    for place, name in enumerate(names):
        column, _, bad = floats(table.column(name), name)
        for row, reason in bad.items():
            rejected.setdefault(row, reason)
        with np.errstate(over="ignore"):
            columns[place] = column
    values = torch.from_numpy(columns).t().contiguous().numpy()  # in blocks, where a column at a time misses the cache
    finite = np.isfinite(values)
    if not finite.all():
        for row in np.flatnonzero(~finite.all(axis=1)).tolist():
            name = names[int(np.flatnonzero(~finite[row])[0])]
            rejected.setdefault(row, f"column {name!r}: missing or not finite")
            values[row] = 0
    return values, rejected


def _vectors(column: Any, name: str) -> tuple[np.ndarray, dict[int, str]]:
    """(rows, size) float32 of a column of lists of one length, zeros in rows that cannot be used."""
    pa = arrow()
    column = combined(column)
    rejected: dict[int, str] = {}
    if column.null_count:
        missing = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        rejected = {int(row): f"column {name!r}: missing" for row in missing}
        size = column.type.list_size
        column = pa.array([[0.0] * size if v is None else v for v in column.to_pylist()], column.type)
    flat = column.flatten().cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    values = flat.reshape(len(column), column.type.list_size).copy()
    ok = np.isfinite(values).all(axis=1)
    for row in np.flatnonzero(~ok).tolist():
        rejected.setdefault(row, f"column {name!r}: missing or not finite")
        values[row] = 0
    return values, rejected


def digest(model: Any) -> str:
    """What a model is, so that a job is not gone on with by another one."""
    if isinstance(model, Predictor):
        found = hashlib.sha256(f"{model.seed} {model.n_samples} {model.likelihood!r}".encode())
        for module in (model.posterior, model.likelihood):
            for name, t in module.state_dict().items():
                found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
                found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()
    manifest = Path(model) / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"{model} is not a saved model: there is no {manifest}")
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def schema_at(model: Any) -> Schema | None:
    """The schema in an artefact, read without loading the model."""
    if isinstance(model, Predictor):
        return None if model.manifest is None else schema_of(model.manifest.extras)
    from vbdl.artefact.manifest import read

    return schema_of(read(model).extras)


def image_row(model: Any) -> ImageRow | None:
    """What a row of a network of images is, where its model says it."""
    if isinstance(model, Predictor):
        inputs = None if model.manifest is None else model.manifest.inputs
    else:
        from vbdl.artefact.manifest import read

        inputs = read(model).inputs
    if inputs is None or len(inputs.tensors) != 1 or len(inputs.tensors[0].shape) not in (2, 3):
        return None
    return ImageRow(tuple(inputs.tensors[0].shape), DTYPES[inputs.tensors[0].dtype])


def available() -> int:
    """Cores that this process may use, or OMP_NUM_THREADS where that is fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(told)) if told.isdigit() and int(told) > 0 else cores


def plain(options: Options) -> dict[str, Any]:
    """Options that a result depends on, as JSON has them."""
    return json.loads(json.dumps({name: value for name, value in vars(options).items() if name != "trust"}))
