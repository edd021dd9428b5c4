"""Parts as one file."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vbdl.batch.arrays import join_arrays
from vbdl.batch.folder import QUARANTINE, parquet_options, write_atomic
from vbdl.tabular.reading import arrow


def merge_parts(folder: Path, out: Path, manifest: dict[str, Any], kind: str) -> Path | None:
    """One part after the other into `out`, whole or not there; its manifest and quarantine beside it. Returns the
    quarantine."""
    if not manifest["parts"]:
        reasons = "; ".join(manifest["failed"].values())
        raise ValueError(f"there is nothing to write: {reasons or 'there is no row in the input'}")
    quarantine = out.with_name(f"{out.name}.quarantine.jsonl")
    if manifest["rejected"]:
        data = (folder / QUARANTINE).read_bytes()
        write_atomic(quarantine, lambda p: _write(p, data))
    else:
        quarantine.unlink(missing_ok=True)
    parts = [folder / e["part"] for e in manifest["parts"]]
    write_atomic(out, lambda p: _merge(p, parts, kind))
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomic(out.with_name(f"{out.name}.manifest.json"), lambda p: _write(p, text.encode()))
    return quarantine if manifest["rejected"] else None


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _merge(out: Path, parts: Sequence[Path], kind: str) -> None:
    pa = arrow()
    if kind == "csv":
        with open(out, "wb") as sink:
            for number, path in enumerate(parts):
                with open(path, "rb") as part:
                    header = part.readline()
                    if number == 0:
                        sink.write(header)
                    shutil.copyfileobj(part, sink)
    elif kind == "npy":
        join_arrays(out, parts)
    elif kind == "parquet":
        import pyarrow.parquet

        schema = pyarrow.parquet.read_schema(parts[0])
        with pyarrow.parquet.ParquetWriter(out, schema, **parquet_options(schema)) as writer:
            for path in parts:
                writer.write_table(pyarrow.parquet.ParquetFile(path).read())
    else:
        writer: Any = None
        for path in parts:
            with pa.OSFile(os.fspath(path), "rb") as source:
                table = pa.ipc.open_file(source).read_all()
            writer = writer or pa.ipc.new_file(os.fspath(out), table.schema)
            writer.write_table(table)
        writer.close()
