"""A sink that collects the results of a job as one table in memory."""

import logging
from typing import TYPE_CHECKING

from vbdl.batch.worker import ChunkResult
from vbdl.batch.writing import with_source
from vbdl.tabular.reading import arrow

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger("vbdl")


class TableSink:
    """Collects the tables of chunks. named: whether the table has a column `source`."""

    rows_done = 0

    def __init__(self, named: bool):
        self._named = named
        self._tables: list[tuple[str, pyarrow.Table]] = []
        self._rejected: list[tuple[int, str]] = []

    def is_done(self, source: str, chunk: int) -> bool:
        return False

    def write(self, source: str, chunk: int, result: ChunkResult) -> None:
        self._tables.append((source, result.table))
        self._rejected.extend(result.rejected)

    def fail(self, source: str, error: Exception) -> None:
        raise error

    def table(self) -> "pyarrow.Table":
        """Return one table of all chunks in the order of their writing. Logs the number of rows that are not in it."""
        if self._rejected:
            row, reason = self._rejected[0]
            logger.warning(
                "%d rows could not be used and are not in the table; row %d: %s", len(self._rejected), row, reason
            )
        # a chunk without rows may not know its columns
        tables = [(source, t) for source, t in self._tables if t.num_rows] or self._tables[:1]
        return arrow().concat_tables([with_source(t, source) if self._named else t for source, t in tables])
