"""Runs of a batch job: an engine reports results to a run, which passes them on to a sink."""

import time
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from vbdl.batch.job import Job
from vbdl.batch.sources.source import Source
from vbdl.batch.worker import ChunkResult
from vbdl.progress import Progress


class QuarantineError(ValueError):
    """Raised for a row that cannot be used if on_error is "stop"."""


class Sink(Protocol):
    """The receiver of a job's results: a folder of parts, or a table in memory."""

    @property
    def rows_done(self) -> int:
        """The number of rows in chunks that an earlier run finished."""
        ...

    def is_done(self, source: str, chunk: int) -> bool:
        """Whether an earlier run finished this chunk."""
        ...

    def write(self, source: str, chunk: int, result: ChunkResult) -> None:
        """Keep the result of a chunk."""
        ...

    def fail(self, source: str, error: Exception) -> None:
        """Note that a source could not be read to its end or does not fit the model, or raise the error."""
        ...


S_co = TypeVar("S_co", bound=Sink, covariant=True)


class Run(Generic[S_co]):
    """A run computes the chunks of a job that its sink lacks. An engine is a function of a run.

    on_error: "stop" ends the run at the first row or source that cannot be used.
    progress: see `vbdl.progress.Progress`.
    """

    def __init__(self, job: Job, sink: S_co, on_error: str, progress: bool | None):
        self.job, self.sink, self.stops = job, sink, on_error == "stop"
        self._bar = RowCounter(job.sources, progress)

    def __enter__(self) -> "Run[S_co]":
        self._bar.__enter__()
        self._bar.add(self.sink.rows_done, timed=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def write(self, source: Source, chunk: int, result: ChunkResult) -> None:
        """Pass the result of a chunk on to the sink."""
        self.check_rejected(source.name, result.rejected)
        self.sink.write(source.name, chunk, result)
        self.count(result.table.num_rows + len(result.rejected))

    def count(self, rows: int) -> None:
        """Add rows to the progress bar."""
        self._bar.add(rows)

    def check_rejected(self, source: str, rejected: list[tuple[int, str]]) -> None:
        """Raise QuarantineError if a row was rejected and on_error is "stop"."""
        if rejected and self.stops:
            row, reason = rejected[0]
            raise QuarantineError(f"{source}, row {row}: {reason}")

    def fail(self, source: str, error: Exception) -> None:
        """Raise the error of a source if on_error is "stop", else leave it to the sink."""
        if self.stops:
            raise error
        self.sink.fail(source, error)


class RowCounter(Progress):
    """A progress bar of rows, rows per second, and the time left if the number of rows is known."""

    def __init__(self, sources: tuple[Source, ...], shown: bool | None):
        counts = [s.count() for s in sources]
        known = all(c is not None for c in counts)
        super().__init__("predicting", sum(c or 0 for c in counts) if known else 0, shown)
        self._timed = 0

    def add(self, rows: int, timed: bool = True) -> None:
        """Count rows as done. timed: whether they were computed in this run, and so count for the speed."""
        self._timed += rows if timed else 0
        self.total = max(self.total, self.done + rows)
        passed = max(time.monotonic() - self._start, 1e-9)
        self.advance(f"{self._timed / passed:,.0f} rows/s", by=rows)
