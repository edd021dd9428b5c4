"""A folder of finished parts, which a kill at any moment leaves whole, and which the next run goes on from.

A part is written under a hidden name, on the disk (fsync), then renamed; only then the journal says that it is done. A
part without its line in the journal is made again, with the same bytes. At the end the manifest takes the journal's
place. Files with a leading `.` or `_` are not read by Arrow, Spark and their kind.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vbdl.batch.arrays import write_array
from vbdl.tabular.reading import arrow

JOURNAL, MANIFEST, QUARANTINE, LOCK = "_journal.jsonl", "_manifest.json", "_quarantine.jsonl", "_lock"
FORMATS = {"parquet": ".parquet", "csv": ".csv", "arrow": ".arrow", "npy": ".npy"}


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside this path, bring it to the disk, rename it: there is a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_table(table: Any, path: Path, kind: str) -> None:
    """A table in one of FORMATS; the same table gives the same bytes."""
    pa = arrow()
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path, **parquet_options(table.schema))
    elif kind == "csv":
        from pyarrow import csv

        csv.write_csv(flat(table), path)
    elif kind == "npy":
        write_array(path, flat(table, fixed=False))
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


def parquet_options(schema: Any) -> dict[str, Any]:
    """Dictionaries where words repeat; numbers are written as they are, which is faster and no larger."""
    words = [f.name for f in schema if arrow().types.is_string(f.type)]
    return {"use_dictionary": words, "write_statistics": False}


def part_name(source: str, chunk: int, kind: str) -> str:
    """Called after its source, without the suffix of that."""
    stem = source.removesuffix(".gz")
    stem = stem if (dot := stem.rfind(".")) <= stem.rfind("/") + 1 else stem[:dot]
    return f"{stem}-{chunk:05d}{FORMATS[kind]}"


def with_source(table: Any, source: str) -> Any:
    """The table with its source in every row."""
    pa = arrow()
    return table.add_column(0, "source", pa.array([source] * table.num_rows, pa.string()))


def flat(table: Any, fixed: bool = True) -> Any:
    """Lists as text, for formats that have no cells for them; fixed: also those of one length."""
    pa = arrow()
    for place, column in enumerate(table.schema):
        if pa.types.is_nested(column.type) and (fixed or not pa.types.is_fixed_size_list(column.type)):
            words = [None if v is None else json.dumps(v) for v in table.column(place).to_pylist()]
            table = table.set_column(place, column.name, pa.array(words, pa.string()))
    return table


class Folder:
    """The output of a job. Opened by one process at a time.

    settings: what the job is, as JSON holds it: another job in the same folder is refused. named: parts have a column
    `source`, for those that become one file.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], kind: str = "parquet", restart: bool = False, named: bool = False
    ):
        if kind not in FORMATS:
            raise ValueError(f"format {kind!r} is none of {', '.join(FORMATS)}")
        self.path, self.kind, self.named = path, kind, named
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[tuple[str, int], dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        path.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign()
        self._lock = open(path / LOCK, "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(f"another job is writing to {path}") from None
        try:
            if restart or self._has_no_part():
                self._clear()
            self._open()
        except BaseException:
            self.close()
            raise

    def _refuse_foreign(self) -> None:
        """ValueError, before anything is written, where the folder is somebody else's: a model, a folder of data."""
        if (self.path / MANIFEST).exists() or (self.path / JOURNAL).exists():
            return
        if others := [p.name for p in sorted(self.path.iterdir()) if p.name != LOCK and not _leftover(p)]:
            raise ValueError(f"{self.path} holds {others[0]!r} and no journal of a job: choose an empty folder")

    def _has_no_part(self) -> bool:
        """Whether a job that began here ended before its first part: there is nothing to go on with, or to protect."""
        return {p.name for p in self.path.iterdir() if not _leftover(p)} <= {LOCK, JOURNAL, MANIFEST}

    def _open(self) -> None:
        self.finished: dict[str, Any] | None = None
        if (self.path / MANIFEST).exists():
            before = json.loads((self.path / MANIFEST).read_text())
            self._compare(before["settings"])
            self.finished = before
            self._sweep()
            return
        journal = self.path / JOURNAL
        if journal.exists():
            self._read(journal)
        else:
            write_atomic(journal, lambda p: p.write_text(json.dumps({"settings": self.settings}) + "\n"))
        self._journal = open(journal, "a")  # noqa: SIM115
        for stale in _temporary(self.path):
            stale.unlink(missing_ok=True)

    def _read(self, journal: Path) -> None:
        """The lines that were written whole; one that a kill cut off is cut away."""
        data = journal.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            raise ValueError(f"{journal} is damaged: start again with restart=True (--restart)")
        self._compare(lines[0]["settings"])
        for entry in lines[1:]:
            path = self.path / entry["part"]
            if path.exists() and path.stat().st_size == entry["bytes"]:
                self.done[entry["source"], entry["chunk"]] = entry
        if len(whole) < len(data):
            with open(journal, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())

    def _compare(self, before: dict[str, Any]) -> None:
        if before == self.settings:
            return
        changed = [k for k in {**before, **self.settings} if before.get(k) != self.settings.get(k)]
        raise ValueError(
            f"{self.path} holds the output of another job: {', '.join(sorted(changed))} changed since. Choose another "
            f"folder, or write it again with restart=True (--restart)"
        )

    def _clear(self) -> None:
        """Everything that a job of ours has written, and nothing else."""
        known: set[str] = set()
        for name in (MANIFEST, JOURNAL):
            if (self.path / name).exists():
                text = (self.path / name).read_text()
                entries = json.loads(text)["parts"] if name == MANIFEST else _entries(text)
                known |= {e["part"] for e in entries}
        for name in [*sorted(known), MANIFEST, JOURNAL, QUARANTINE]:
            (self.path / name).unlink(missing_ok=True)
        for stale in [*_temporary(self.path), *(self.path / QUARANTINE_PARTS).glob("*.jsonl")]:
            stale.unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        (self.path / JOURNAL).unlink(missing_ok=True)
        parts = self.path / QUARANTINE_PARTS
        if parts.is_dir():
            for file in parts.rglob("*.jsonl"):
                file.unlink()
            for folder in sorted((p for p in parts.rglob("*") if p.is_dir()), reverse=True):
                folder.rmdir()
            parts.rmdir()
        for stale in _temporary(self.path):
            stale.unlink(missing_ok=True)

    # -- parts

    def write(self, source: str, chunk: int, table: Any, rejected: list[tuple[int, str]]) -> dict[str, Any]:
        """A part, and its entry for the journal. Any process may call it; `record` is for the one that holds the
        folder."""
        part = part_name(source, chunk, self.kind)
        table = with_source(table, source) if self.named else table
        return write_part(self.path, part, self.kind, source, chunk, table, rejected)

    def record(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.done[entry["source"], entry["chunk"]] = entry

    def finish(self, order: Iterable[str]) -> dict[str, Any]:
        """The manifest, in the order of the sources; nothing is written any more."""
        place = {name: i for i, name in enumerate(order)}
        parts = sorted(self.done.values(), key=lambda e: (place[e["source"]], e["chunk"]))

        def gathered(path: Path) -> None:
            with open(path, "wb") as out:
                for entry in parts:
                    if entry["rejected"]:
                        out.write(_quarantine_path(self.path, entry["part"]).read_bytes())

        if any(e["rejected"] for e in parts):
            write_atomic(self.path / QUARANTINE, gathered)
        self.finished = {
            "rows": sum(e["rows"] for e in parts),
            "rejected": sum(e["rejected"] for e in parts),
            "failed": {name: self.failed[name] for name in place if name in self.failed},
            "parts": parts,
            "settings": self.settings,
        }
        text = json.dumps(self.finished, indent=1) + "\n"
        write_atomic(self.path / MANIFEST, lambda p: p.write_text(text))
        self._journal.close()
        self._sweep()
        return self.finished

    def close(self) -> None:
        journal = getattr(self, "_journal", None)
        if journal is not None:
            journal.close()
        self._lock.close()


QUARANTINE_PARTS = "_quarantine"


def write_part(
    folder: Path, part: str, kind: str, source: str, chunk: int, table: Any, rejected: list[tuple[int, str]]
) -> dict[str, Any]:
    """A part and its quarantined rows on the disk; the entry says what they are."""
    if rejected:
        lines = "".join(json.dumps({"source": source, "row": r, "reason": why}) + "\n" for r, why in rejected)
        write_atomic(_quarantine_path(folder, part), lambda p: p.write_text(lines))
    path = folder / part
    found: dict[str, Any] = {}

    def write(partial: Path) -> None:
        write_table(table, partial, kind)
        data = partial.read_bytes()
        found.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    write_atomic(path, write)
    return {"part": part, "source": source, "chunk": chunk, "rows": table.num_rows, "rejected": len(rejected), **found}


def _quarantine_path(folder: Path, part: str) -> Path:
    return folder / QUARANTINE_PARTS / f"{part}.jsonl"


def _temporary(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


def _leftover(path: Path) -> bool:
    """What a kill before the journal's first line has left."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _entries(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()[1:]]
