"""A folder of finished parts: a kill at any moment leaves it consistent, and the next run resumes the job from it.

A part is written under a hidden name and flushed to the disk (fsync), then recorded in the journal, then renamed. So
the journal knows every part; a recorded part that is missing or changed is computed again, with the same bytes. At the
end the manifest replaces the journal. Arrow, Spark and similar readers ignore files with a leading `.` or `_`.
"""

import io
import itertools
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import cast

from vbdl.batch.deleting import delete_all
from vbdl.batch.locking import lock
from vbdl.batch.naming import (
    FORMATS,
    JOURNAL,
    LOCK,
    MANIFEST,
    QUARANTINE,
    QUARANTINE_PARTS,
    SET_ASIDE,
    Names,
    files_below,
    inside,
    part_name,
)
from vbdl.batch.parts import PartWriter
from vbdl.batch.quarantine import Quarantine, gather
from vbdl.batch.records import DraftEntry, JobRecord, Manifest, PartEntry, Records, job_of, read_records, signed
from vbdl.batch.sources.source import printable
from vbdl.batch.worker import ChunkResult
from vbdl.batch.writing import is_as_recorded, sync, write_atomic

logger = logging.getLogger("vbdl")


class Folder:
    """The folder that a job writes its parts to; one process at a time can open it.

    settings: the job's settings for JSON; a folder of a job with other settings is refused. named: whether parts have a
    column `source`, because they become one file. verify: read every part again, even if its size and time are
    unchanged.

    `done`: the existing parts. `damaged`: the names of parts that are missing or changed. `finished`: the manifest if
    the job is finished, else None.
    """

    def __init__(
        self,
        path: Path,
        settings: JobRecord,
        kind: str = "parquet",
        restart: bool = False,
        named: bool = False,
        verify: bool = False,
    ):
        if kind not in FORMATS:
            raise ValueError(f"format {kind!r} is none of {', '.join(FORMATS)}")
        self.path, self.parts = path, PartWriter(path, kind, named)
        self.settings = json.loads(json.dumps(settings))
        self.names, self._job = Names(self.settings), job_of(self.settings)
        if outside := [name for name in sorted(self.names.sources) if not inside(part_name(name, 0, kind))]:
            raise ValueError(f"a source called {outside[0]!r} would be written outside of {path}: give it a plain name")
        self.done: dict[tuple[str, int], PartEntry] = {}
        self.failed: dict[str, str] = {}
        self.damaged: list[str] = []
        self.finished: Manifest | None = None
        self._journal: io.FileIO | None = None
        self._lock: int | None = None
        path.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign()
        read_records(path, self.settings)  # refused before anything is touched
        self._lock = lock(path)
        try:
            records = read_records(path, self.settings)
            if not restart and self._to_be_kept(records):
                self._go_on(records, verify)
            else:
                self._clear(records)
                self._begin([])
        except BaseException:
            self.close()
            raise

    def _refuse_foreign(self) -> None:
        """Raise ValueError, before anything is written, if the folder holds files of no job, like a model or data."""
        if (self.path / MANIFEST).exists() or (self.path / JOURNAL).exists():
            return
        for place in sorted(self.path.iterdir()):
            if place.name != LOCK and not self.names.is_in_work(place.name):
                raise ValueError(f"{self.path} holds {place.name!r} and no journal of a job: choose an empty folder")

    def _to_be_kept(self, records: Records) -> bool:
        """Whether the folder holds work of this job. Raises ValueError if it holds work of another job."""
        there = [n for n in files_below(self.path) if n not in (LOCK, MANIFEST) and not self.names.is_in_work(n)]
        if not there and not (records.damaged and records.settings is None):
            return False  # a job started here and ended before its first part
        if records.settings == self.settings:
            return True
        if records.settings is not None:
            before, now = records.settings, self.settings
            changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            raise ValueError(
                f"{self.path} holds the output of another job: {', '.join(sorted(changed))} changed since. Choose "
                f"another folder, or write it again with restart=True (--restart)"
            )
        strangers = [n for n in there if n != QUARANTINE and not self.names.is_part(n)]
        if records.unknown or strangers or not there:
            raise ValueError(
                f"the records of the job in {self.path} are damaged: they do not say whether its parts are of this "
                f"job. Write it again with restart=True (--restart), or choose another folder"
            )
        return True

    def _go_on(self, records: Records, verify: bool) -> None:
        """Resume the job: keep the parts that match their records; the others will be computed again."""
        manifest, since = records.finished, None if verify else records.written
        quarantine = Quarantine(self.path, manifest)
        last = records.entries[-1]["part"] if records.entries and manifest is None else None
        entries = {(e["source"], e["chunk"]): e for e in records.entries}
        for key, entry in entries.items():
            place = self.path / entry["part"]
            if is_as_recorded(place, entry, since) and quarantine.holds(entry):
                self.done[key] = entry
            elif entry["part"] != last or place.exists():  # the last line is written before its part has a name
                self.damaged.append(entry["part"])
        if manifest is not None and not self.damaged:
            self.finished = manifest
            self._sweep()
            return
        if records.damaged:
            logger.warning("%s: the records of the job are damaged; what they do not say is computed again", self.path)
        if manifest is None and not records.damaged and len(self.done) == len(entries):
            self._append_to_journal()
            self._sweep_temporary()
            return
        if manifest is not None:
            for entry in self.done.values():
                quarantine.split_off(entry)
        self._begin(list(self.done.values()))
        with suppress(FileNotFoundError):
            os.unlink(self.path / MANIFEST)

    def _begin(self, entries: list[PartEntry]) -> None:
        lines = [signed({"settings": self.settings}, self._job), *entries]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomic(self.path / JOURNAL, lambda p: p.write_text(text))
        self._append_to_journal()
        self._sweep_temporary()

    def _append_to_journal(self) -> None:
        handle = os.open(self.path / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._journal = io.FileIO(handle, "wb")

    # -- deleting: only files of this job, or of the job whose records are here

    def _clear(self, records: Records) -> None:
        """Delete what the recorded job wrote, its records last, so that a killed deletion can be repeated.

        A part that was changed may be the work of a user: it is renamed unless this job overwrites it.
        """
        before = Names(records.settings) if records.settings is not None else self.names
        for entry in records.entries:
            path = self.path / entry["part"]
            if is_as_recorded(path, entry, None):
                os.unlink(path)
            elif path.exists() and not self.names.is_part(entry["part"]):
                self._set_aside(entry["part"])
        for name in files_below(self.path):
            if name != JOURNAL and (before.is_in_work(name) or self.names.is_in_work(name)):
                (self.path / name).unlink(missing_ok=True)
        for source in before.sources:
            self._remove_empty(source)
        self._remove_quarantine_folders()
        for name in (QUARANTINE, MANIFEST, JOURNAL):
            (self.path / name).unlink(missing_ok=True)

    def _set_aside(self, part: str) -> None:
        place = self.path / part
        free = (place.with_name(f"{SET_ASIDE}{number}-{place.name}") for number in itertools.count(1))
        aside = next(path for path in free if not os.path.lexists(path))
        os.replace(place, aside)
        logger.warning("%s is not as a job wrote it: it is called %s now", place, aside.name)

    def _sweep(self) -> None:
        for name in files_below(self.path):
            if self.names.is_in_work(name):
                (self.path / name).unlink(missing_ok=True)
        self._remove_quarantine_folders()

    def _sweep_temporary(self) -> None:
        for name in files_below(self.path):
            if name.rpartition("/")[2].startswith(".") and self.names.is_in_work(name):
                (self.path / name).unlink(missing_ok=True)

    def _remove_quarantine_folders(self) -> None:
        top = self.path / QUARANTINE_PARTS
        if top.is_symlink():
            return
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):  # the folder is not empty
                os.rmdir(folder)

    def _remove_empty(self, name: str) -> None:
        """Remove the folders that were created for the parts of a source, if they are empty."""
        above = [self.path / p for p in Path(name).parents if p != Path(".")]
        if inside(name) and not any(folder.is_symlink() for folder in above):
            for folder in above:
                with suppress(OSError):
                    os.rmdir(folder)

    def remove(self) -> None:
        """Delete the files of this job after its parts became one file, and the folder if it is empty then."""
        delete_all(self.path, self.names)
        self.close()

    # -- the sink of a run

    @property
    def rows_done(self) -> int:
        return sum(entry["rows"] + entry["rejected"] for entry in self.done.values())

    def is_done(self, source: str, chunk: int) -> bool:
        return (source, chunk) in self.done

    def write(self, source: str, chunk: int, result: ChunkResult) -> None:
        self.record(self.parts.write(source, chunk, result))

    def fail(self, source: str, error: Exception) -> None:
        """Log and note why a source could not be read to its end or does not fit the model.

        Only the first reason of a source is kept, because each of its chunks may fail.
        """
        if source not in self.failed:
            reason = printable(" ".join(str(error).split()))
            logger.warning("%s: %s", source, reason)
            self.failed[source] = reason

    def record(self, draft: DraftEntry) -> None:
        """Note a part in the journal, then give it its name."""
        place = self.path / draft["part"]
        partial = place.with_name(draft["partial"])
        entry = cast(PartEntry, {key: value for key, value in draft.items() if key != "partial"})
        entry = signed(entry, self._job)
        assert self._journal is not None
        line = json.dumps(entry).encode() + b"\n"
        try:
            while line:  # a full disk may write only a piece of the line
                line = line[self._journal.write(line) :]
            os.fsync(self._journal.fileno())
            os.replace(partial, place)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        sync(place.parent)
        self.done[entry["source"], entry["chunk"]] = entry

    def finish(self, order: Iterable[str]) -> Manifest:
        """Replace the journal by the manifest, with the parts in the order of the sources, and return the manifest."""
        place = {name: i for i, name in enumerate(order)}
        parts = sorted(self.done.values(), key=lambda e: (place[e["source"]], e["chunk"]))
        gather(self.path, parts)
        known = {e["part"] for e in parts}
        for name in files_below(self.path):
            if self.names.is_part(name) and name not in known:
                self._set_aside(name)
        manifest: Manifest = {
            "rows": sum(e["rows"] for e in parts),
            "rejected": sum(e["rejected"] for e in parts),
            "failed": {name: self.failed[name] for name in place if name in self.failed},
            "parts": parts,
            "settings": self.settings,
        }
        self.finished = signed(manifest, self._job)
        text = json.dumps(self.finished, indent=1) + "\n"
        write_atomic(self.path / MANIFEST, lambda p: p.write_text(text))
        self._close_journal()
        self._sweep()
        return self.finished

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def close(self) -> None:
        """Close the journal and release the folder's lock."""
        self._close_journal()
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None
