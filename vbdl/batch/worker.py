"""Workers compute chunks: they encode rows as network inputs, predict them, and make output columns."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vbdl import former
from vbdl.artifact.loading import load
from vbdl.artifact.manifest import class_names
from vbdl.batch.encoding import CellCounts, Encoder
from vbdl.batch.job import Job
from vbdl.batch.keeping import as_settled
from vbdl.batch.model import row_shape
from vbdl.batch.output import Columns, fields
from vbdl.batch.sources.source import Chunk, one_line
from vbdl.calling.inputs import map_inputs, tensors
from vbdl.engine.predictor import Predictor
from vbdl.tabular.reading import arrow
from vbdl.types import Inputs

if TYPE_CHECKING:
    import pyarrow

Reasons = dict[int, str]
"""{row: why it cannot be used}"""


class Misfit(ValueError):
    """Raised for a source that does not fit the model: columns are missing, or have types the model cannot take."""


@dataclass
class ChunkResult:
    """The output of a chunk, in the order of its rows, and the rows that are not in it."""

    table: "pyarrow.Table"
    rejected: list[tuple[int, str]]  # (row number, reason), ascending
    cells: CellCounts


class Worker:
    """A worker computes the chunks of a job with a predictor. Several threads may share a worker.

    threads: the number of threads among which the rows of a chunk are divided.
    """

    def __init__(self, job: Job, threads: int = 1):
        self.job = job
        tiles, compile = (job.options.tile,), bool(job.options.compile)
        if isinstance(job.model, Predictor):
            self.predictor = job.model.replace(tiles=tiles, compile=compile)
            self._row_shape = row_shape(job.model)
        else:
            self.predictor = load(job.model, trust=job.options.trust, tiles=tiles, compile=compile)
            self._row_shape = row_shape(self.predictor)
        target = None if job.schema is None else job.schema.target
        manifest = self.predictor.manifest
        self._labels = None if manifest is None or target is not None else class_names(manifest.extras)
        if target is not None and target.classes is not None:
            self._labels = [target.label(i) for i in range(len(target.classes))]
        self._encoder = Encoder(job.schema, job.options, self._row_shape)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._threads = threads
        self._predicted_row: Inputs | None = None  # a row for which the model raised no error

    def compile(self) -> None:
        """Compile before the first chunk, if the job is compiled and its schema describes a row."""
        options, schema = self.job.options, self.job.schema
        if options.compile and schema is not None:
            self.predictor.warm_up((options.tile,), example=schema.example(), samples=options.interval > 0)

    def compute(self, chunk: Chunk) -> ChunkResult:
        """Compute the output columns of a chunk.

        Raises Misfit if its source does not fit the model, and ValueError for an error that any source would cause.
        """
        pa = arrow()
        try:
            encoded = self._encoder.encode(chunk.data)
        except (ValueError, pa.ArrowException) as error:
            raise Misfit(str(error)) from error
        x, bad = encoded.x, encoded.rejected
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
        carried = {"row_id": pa.array(chunk.rows[keep]), **self._copied(chunk, keep, columns)}
        return ChunkResult(pa.table({**carried, **columns}), sorted(rejected), encoded.cells)

    def _copied(self, chunk: Chunk, keep: np.ndarray, columns: Columns) -> Columns:
        """Return the input columns that are copied to the output, for the rows in the mask `keep`."""
        if not self.job.options.keep:
            return {}
        if isinstance(chunk.data, Tensor | Sequence | Mapping):
            raise ValueError("keep is for columns of tables, and the rows of this source have no columns: leave it out")
        pa = arrow()
        rows = chunk.data.filter(pa.array(keep))
        copies: Columns = {}
        for name in self.job.options.keep:
            if name == "row_id" or name in copies or name in columns:
                raise ValueError(f"column {name!r} would stand in the output twice: rename it in the input")
            try:
                copies[name] = as_settled(rows.column(name), name, self.job.kept)
            except (KeyError, pa.ArrowException) as error:
                raise Misfit(f"column {name!r} cannot be kept: {one_line(error)}") from error
        return copies

    def _predict(self, x: Inputs, n: int) -> tuple[Columns, Reasons]:
        """Return the output columns of n rows, and {row: reason} of the rows that have none.

        Threads get whole tiles of rows, so that the numbers of a tile do not depend on the number of threads.
        """
        if n == 0 and self._predicted_row is not None:
            x = _rows(self._predicted_row, 0, 0)
        elif n == 0 and self._row_shape is not None:
            x = torch.zeros(0, *self._row_shape, dtype=self._dtype())
        elif n == 0 and tensors(x)[0].ndim < 2:  # the shape of a row is unknown
            return {}, {}
        tile = self.job.options.tile
        each = max(tile, -(-n // tile // self._threads) * tile) if self._pool is not None else max(n, 1)
        starts = range(0, max(n, 1), each)
        pieces = [_rows(x, start, start + each) for start in starts]
        predicted = (
            [self._piece(p) for p in pieces] if self._pool is None else list(self._pool.map(self._piece, pieces))
        )
        tables = [columns for columns, _ in predicted if columns is not None]
        if not tables:  # only the names and types of the columns
            some = self._columns(_rows(x, 0, 0) if self._predicted_row is None else self._predicted_row)[0]
            tables = [{name: column.slice(0, 0) for name, column in some.items()}]
        without: Reasons = {}
        for start, (_, reasons) in zip(starts, predicted, strict=True):
            without |= {start + row: reason for row, reason in reasons.items()}
        return _concatenated(tables), without

    def _piece(self, x: Inputs) -> tuple[Columns | None, Reasons]:
        """Return the output columns of these rows (None if no row has any), and {row: reason} of rows without any.

        If the model raises an error, both halves are tried, and so on, until the rows that cause errors are alone.
        The numbers of a row do not depend on other rows, so those of the remaining rows do not change.
        """
        try:
            return self._columns(x)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # networks raise errors of many kinds
            n = _length(x)
            if n == 0 or not self._works(x):
                raise  # the error is not caused by the values of a row
            if n == 1:
                return None, {0: f"the model raised {type(error).__name__}: {_first_line(error)}"}
        half = n // 2
        one, other = self._piece(_rows(x, 0, half)), self._piece(_rows(x, half, n))
        tables = [columns for columns, _ in (one, other) if columns is not None]
        without = {**one[1], **{half + row: reason for row, reason in other[1].items()}}
        return _concatenated(tables) if tables else None, without

    def _columns(self, x: Inputs) -> tuple[Columns, Reasons]:
        p = self.predictor(x, samples=self.job.options.interval > 0)
        if self._predicted_row is None and _length(x):
            self._predicted_row = map_inputs(lambda t: t[:1].clone(), x)
        columns = fields(p, self._labels, self.job.options.columns, self.job.options.interval)
        total = p.total.flatten(1).sum(1) if p.total.ndim > 1 else p.total
        if bool(torch.isfinite(total.sum())) or bool((finite := torch.isfinite(total)).all()):
            return columns, {}
        keep = arrow().array(finite.cpu().numpy())
        without = dict.fromkeys((~finite).nonzero().flatten().tolist(), "the prediction is not finite")
        return {name: column.filter(keep) for name, column in columns.items()}, without

    def _works(self, x: Inputs) -> bool:
        """Whether the model predicts some row: one predicted before, or else zero rows, the first or the middle one."""
        middle = _length(x) // 2
        if self._predicted_row is not None:
            candidates = [self._predicted_row]
        else:
            candidates = [_rows(x, 0, 0), _rows(x, 0, 1), _rows(x, middle, middle + 1)]
        for rows in candidates:
            try:
                self._columns(rows)
            except Exception:
                continue
            return True
        return False

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.predictor.posterior.parameters() if p.is_floating_point()), torch.float32)


def _rows(x: Inputs, start: int, end: int) -> Inputs:
    return map_inputs(lambda t: t[start:end], x)


def _length(x: Inputs) -> int:
    return len(tensors(x)[0])


def _first_line(error: Exception) -> str:
    """Return the first line of an error, without its place in compiled code, which differs between machines."""
    line = next(iter(str(error).strip().splitlines()), "")
    return re.sub(r"^kernel, \S+:\d+, ", "", line)[:200]


def _concatenated(tables: list[Columns]) -> Columns:
    if len(tables) == 1:
        return tables[0]
    return {name: arrow().concat_arrays([t[name] for t in tables]) for name in tables[0]}


__getattr__ = former.names(__name__, {"Result": "ChunkResult"})
