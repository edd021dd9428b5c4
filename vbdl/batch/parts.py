"""Parts: files with the output of one chunk each, under a hidden name until the journal has recorded them."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vbdl.batch.naming import check_place, part_name, quarantine_name
from vbdl.batch.records import DraftEntry
from vbdl.batch.worker import ChunkResult
from vbdl.batch.writing import identity, sync, temporary, with_source, write_atomic, write_table


@dataclass(frozen=True)
class PartWriter:
    """Writes the parts of a job into a folder, from any process that sees it.

    kind: format, one of `vbdl.batch.naming.FORMATS`. named: whether parts have a column `source`, because they become
    one file.
    """

    folder: Path
    kind: str
    named: bool

    def write(self, source: str, chunk: int, result: ChunkResult) -> DraftEntry:
        """Write a part under a hidden name, and its quarantined rows, to the disk.

        Returns the journal entry, with the hidden name as `partial`.
        """
        part = part_name(source, chunk, self.kind)
        for name in (part, quarantine_name(part)):
            check_place(self.folder, name)
        quarantined: str | None = None
        if result.rejected:
            records = ({"source": source, "row": row, "reason": reason} for row, reason in result.rejected)
            lines = "".join(json.dumps(record) + "\n" for record in records).encode()
            write_atomic(self.folder / quarantine_name(part), lambda p: p.write_bytes(lines))
            quarantined = sha256(lines).hexdigest()
        path = self.folder / part
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = temporary(path)
        try:
            write_table(with_source(result.table, source) if self.named else result.table, partial, self.kind)
            sync(partial)
            entry: DraftEntry = {
                "part": part,
                "source": source,
                "chunk": chunk,
                "rows": result.table.num_rows,
                "rejected": len(result.rejected),
                **identity(partial),
                "partial": partial.name,
            }
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        if result.cells.unseen:
            entry["unseen"] = result.cells.unseen
        if result.cells.filled:
            entry["filled"] = result.cells.filled
        if quarantined is not None:
            entry["quarantine"] = quarantined
        return entry
