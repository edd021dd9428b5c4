"""Parts as one file, with its manifest and its quarantine beside it."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vbdl.batch.arrays import join_arrays
from vbdl.batch.folder import Folder
from vbdl.batch.naming import QUARANTINE, STAGED, check_place
from vbdl.batch.records import is_manifest, job_of, parsed, signed, written_at
from vbdl.batch.writing import identity, is_as_recorded, parquet_options, sink, sync, temporary
from vbdl.tabular.reading import arrow


class Merged:
    """An output that is one file, and what lies beside it. ValueError where that is not a job's.

    about: the manifest of the job that wrote it, None where there is none.
    """

    def __init__(self, out: Path):
        self.out = out
        self.manifest_path = out.with_name(f"{out.name}.manifest.json")
        self.quarantine_path = out.with_name(f"{out.name}.quarantine.jsonl")
        self.about: dict[str, Any] | None = None
        self.readable = True
        if check_place(out.parent, self.manifest_path.name):
            self.about = parsed(self.manifest_path.read_bytes())
            self.readable = self.about is not None and is_manifest(self.about)

    def damaged(self, verify: bool) -> list[str]:
        """Names of the files that are not as the manifest says."""
        assert self.about is not None
        since = None if verify else written_at(self.manifest_path)
        found = []
        for path, key in ((self.out, "output"), (self.quarantine_path, "quarantine")):
            record = self.about.get(key)  # none in manifests of vbdl 0.1
            there = path.exists() if record is None else is_as_recorded(path, record, since)
            if not there and (record is not None or key == "output"):
                found.append(path.name)
        return found

    def check_free(self, settings: dict[str, Any]) -> None:
        """ValueError where a job that begins would write over what is not its own."""
        restart = "restart=True (--restart)"
        if not self.readable:
            raise ValueError(f"{self.manifest_path} is damaged, or no manifest of a job: {restart} replaces it")
        if self.out.exists() and self.about is not None and self.about["settings"] != settings:
            raise ValueError(
                f"{self.out} is the output of another job: choose another name, or {restart} to replace it"
            )
        if self.out.exists() and self.about is None:
            raise ValueError(
                f"{self.out} is there already, and not of a job that could be gone on with: {restart} replaces it"
            )
        if self.quarantine_path.exists() and not self._wrote(self.quarantine_path, "quarantine"):
            raise ValueError(f"{self.quarantine_path} is there already, and of no job: {restart} replaces it")

    def _wrote(self, path: Path, key: str) -> bool:
        """Whether the job of the manifest wrote this file, and it is as it was."""
        if self.about is None or not self.readable:
            return False
        record = self.about.get(key)
        return bool(self.about["rejected"]) if record is None else is_as_recorded(path, record, None)

    def write(self, job: Folder, replace: bool) -> dict[str, Any]:
        """One part after the other into the file, then its manifest; the manifest. It can be done again after a kill at
        any moment, to the same bytes. replace: whether files that hold something else may be written over."""
        manifest = job.finished
        assert manifest is not None
        if not manifest["parts"]:
            raise ValueError(f"there is nothing to write: {'; '.join(manifest['failed'].values())}")
        made = {k: v for k, v in manifest.items() if k != "check"}
        if manifest["rejected"]:
            copy = lambda path: shutil.copyfile(job.path / QUARANTINE, path)  # noqa: E731
            made["quarantine"] = self._place(job, self.quarantine_path, copy, replace)
        elif self.quarantine_path.exists() and self._wrote(self.quarantine_path, "quarantine"):
            os.unlink(self.quarantine_path)
        # a part without a row may not know its columns, where no row of its chunk could be used
        with_rows = [e for e in manifest["parts"] if e["rows"]] or manifest["parts"][:1]
        parts = [job.path / e["part"] for e in with_rows]
        made["output"] = self._place(job, self.out, lambda path: _merge(path, parts, job.kind), replace)
        made = signed(made, job_of(manifest["settings"]))
        text = json.dumps(made, indent=1) + "\n"
        self._place(job, self.manifest_path, lambda path: path.write_text(text), True)
        return made

    def _place(self, job: Folder, target: Path, write: Callable[[Path], object], replace: bool) -> dict[str, Any]:
        staged = temporary(job.path / STAGED)
        write(staged)
        sync(staged)
        made = identity(staged)
        if target.exists() and not replace and not is_as_recorded(target, made, None):
            raise ValueError(
                f"{target} is there, and not what the job makes: move it, or replace it with restart=True (--restart)"
            )
        os.replace(staged, target)
        sync(target.parent)
        return made


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

        with sink(out) as file:
            writer: Any = None
            for path in parts:
                with pa.OSFile(os.fsencode(path), "rb") as part:
                    table = pyarrow.parquet.ParquetFile(part).read()
                if writer is None:
                    writer = pyarrow.parquet.ParquetWriter(file, table.schema, **parquet_options(table.schema))
                writer.write_table(table)
            writer.close()
    else:
        with sink(out) as file:
            writer = None
            for path in parts:
                with pa.OSFile(os.fsencode(path), "rb") as part:
                    table = pa.ipc.open_file(part).read_all()
                writer = writer or pa.ipc.new_file(file, table.schema)
                writer.write_table(table)
            writer.close()


def _header(file: Any) -> bytes:
    """The line of names, which may have line breaks between quotes."""
    header = file.readline()
    while header.count(b'"') % 2 and (more := file.readline()):
        header += more
    return header
