"""Merging of the parts of a finished job to one file, with a manifest and the quarantined rows beside it."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from vbdl.batch.arrays import join_arrays
from vbdl.batch.folder import Folder
from vbdl.batch.naming import QUARANTINE, STAGED, check_place
from vbdl.batch.records import FileIdentity, JobRecord, Manifest, is_manifest, job_of, parsed, signed, written_at
from vbdl.batch.writing import identity, is_as_recorded, parquet_options, sink, sync, temporary
from vbdl.tabular.reading import arrow

if TYPE_CHECKING:
    import pyarrow


class Merged:
    """An output file and the two files beside it: its manifest and its quarantined rows.

    about: the manifest of the job that wrote the file, or None if there is none.
    """

    def __init__(self, out: Path):
        self.out = out
        self.manifest_path = out.with_name(f"{out.name}.manifest.json")
        self.quarantine_path = out.with_name(f"{out.name}.quarantine.jsonl")
        self.about: Manifest | None = None
        self._readable = True
        if check_place(out.parent, self.manifest_path.name):
            record = parsed(self.manifest_path.read_bytes())
            if record is not None and is_manifest(record):
                self.about = record
            self._readable = self.about is not None

    def damaged(self, verify: bool) -> list[str]:
        """Return the names of the files whose content differs from the manifest."""
        assert self.about is not None
        since = None if verify else written_at(self.manifest_path)
        damaged = []
        for path, key in ((self.out, "output"), (self.quarantine_path, "quarantine")):
            record = self.about.get(key)  # manifests of vbdl 0.1 have none
            intact = path.exists() if record is None else is_as_recorded(path, record, since)
            if not intact and (record is not None or key == "output"):
                damaged.append(path.name)
        return damaged

    def check_free(self, settings: JobRecord) -> None:
        """Raise ValueError if a new job would overwrite a file that it did not write."""
        restart = "restart=True (--restart)"
        if not self._readable:
            raise ValueError(f"{self.manifest_path} is damaged, or no manifest of a job: {restart} replaces it")
        if self.out.exists() and self.about is not None and self.about["settings"] != settings:
            raise ValueError(
                f"{self.out} is the output of another job: choose another name, or {restart} to replace it"
            )
        if self.out.exists() and self.about is None:
            raise ValueError(
                f"{self.out} is there already, and no job that can be resumed wrote it: {restart} replaces it"
            )
        if self.quarantine_path.exists() and not self._wrote_quarantine():
            raise ValueError(f"{self.quarantine_path} is there already, and no job wrote it: {restart} replaces it")

    def _wrote_quarantine(self) -> bool:
        """Whether the job of the manifest wrote the quarantine file, which is unchanged since."""
        if self.about is None:
            return False
        record = self.about.get("quarantine")
        written = bool(self.about["rejected"])
        return written if record is None else is_as_recorded(self.quarantine_path, record, None)

    def write(self, job: Folder, replace: bool) -> Manifest:
        """Write the parts one after the other into the file, then write and return its manifest.

        After a kill at any moment a second call writes the same bytes. replace: overwrite files with other content.
        """
        manifest = job.finished
        assert manifest is not None
        if not manifest["parts"]:
            raise ValueError(f"there is nothing to write: {'; '.join(manifest['failed'].values())}")
        merged = cast(Manifest, {key: value for key, value in manifest.items() if key != "check"})
        if manifest["rejected"]:
            copy = lambda path: shutil.copyfile(job.path / QUARANTINE, path)  # noqa: E731
            merged["quarantine"] = self._place(job, self.quarantine_path, copy, replace)
        elif self.quarantine_path.exists() and self._wrote_quarantine():
            os.unlink(self.quarantine_path)
        # a part without rows may not know its columns, if no row of its chunk could be used
        with_rows = [e for e in manifest["parts"] if e["rows"]] or manifest["parts"][:1]
        parts = [job.path / e["part"] for e in with_rows]
        merged["output"] = self._place(job, self.out, lambda path: _merge(path, parts, job.parts.kind), replace)
        merged = signed(merged, job_of(manifest["settings"]))
        text = json.dumps(merged, indent=1) + "\n"
        self._place(job, self.manifest_path, lambda path: path.write_text(text), True)
        return merged

    def _place(self, job: Folder, target: Path, write: Callable[[Path], object], replace: bool) -> FileIdentity:
        staged = temporary(job.path / STAGED)
        write(staged)
        sync(staged)
        written = identity(staged)
        if target.exists() and not replace and not is_as_recorded(target, written, None):
            raise ValueError(
                f"{target} is there already with other content: move it, or replace it with restart=True (--restart)"
            )
        os.replace(staged, target)
        sync(target.parent)
        return written


def _merge(out: Path, parts: Sequence[Path], kind: str) -> None:
    pa = arrow()
    if kind == "csv":
        with open(out, "wb") as whole:
            for number, path in enumerate(parts):
                with open(path, "rb") as part:
                    header = _header(part)
                    if number == 0:
                        whole.write(header)
                    shutil.copyfileobj(part, whole)
    elif kind == "npy":
        join_arrays(out, parts)
    elif kind == "parquet":
        import pyarrow.parquet

        read = lambda part: pyarrow.parquet.ParquetFile(part).read()  # noqa: E731
        new = lambda file, schema: pyarrow.parquet.ParquetWriter(file, schema, **parquet_options(schema))  # noqa: E731
        _copy_tables(out, parts, read, new)
    else:
        _copy_tables(out, parts, lambda part: pa.ipc.open_file(part).read_all(), pa.ipc.new_file)


class _TableWriter(Protocol):
    """A writer of Arrow for a file of several tables."""

    def write_table(self, table: "pyarrow.Table") -> None: ...

    def close(self) -> None: ...


def _copy_tables(
    out: Path,
    parts: Sequence[Path],
    read: "Callable[[pyarrow.OSFile], pyarrow.Table]",
    new: "Callable[[pyarrow.OSFile, pyarrow.Schema], _TableWriter]",
) -> None:
    """Copy the tables of all parts to one file. new: a function that opens a Parquet or Arrow writer."""
    with sink(out) as file:
        writer = None
        for path in parts:
            with arrow().OSFile(os.fsencode(path), "rb") as part:
                table = read(part)
            if writer is None:
                writer = new(file, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()


def _header(file: BinaryIO) -> bytes:
    """Return the header of a CSV file, whose quoted names may contain line breaks."""
    header = file.readline()
    while header.count(b'"') % 2 and (more := file.readline()):
        header += more
    return header
