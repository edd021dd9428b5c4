"""Predictions of whole tables, files and folders: `vbdl.predict_table` and `vbdl predict`."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vbdl.batch.changes import CHANGED, Versions
from vbdl.batch.deleting import discard
from vbdl.batch.finding import sources_of
from vbdl.batch.folder import Folder
from vbdl.batch.in_memory import TableSink
from vbdl.batch.job import Job
from vbdl.batch.local import run_local
from vbdl.batch.merging import Merged
from vbdl.batch.model import Model, image_row, schema_at
from vbdl.batch.naming import FORMATS, QUARANTINE
from vbdl.batch.options import JobOptions
from vbdl.batch.records import JobRecord, read_records
from vbdl.batch.report import JobReport, report_of
from vbdl.batch.run import QuarantineError as QuarantineError
from vbdl.batch.run import Run
from vbdl.batch.settling import settle
from vbdl.batch.sources.source import Source
from vbdl.compiling.compiler import can_compile
from vbdl.tabular import Schema

if TYPE_CHECKING:
    import pyarrow

_ROWS_WORTH_COMPILING = 200_000
_BYTES_WORTH_COMPILING = 50_000_000
# suffixes that no folder of parts has
_NOT_WRITTEN = (".gz", ".tsv", ".ipc", ".json", ".jsonl", ".txt", ".xlsx", ".zip")


def predict_table(
    model: Model,
    data: object,
    out: str | Path | None = None,
    *,
    columns: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    interval: float = 0.0,
    inputs: Sequence[str] | None = None,
    schema: Schema | None = None,
    engine: str = "local",
    workers: int | None = None,
    chunk_rows: int = 65_536,
    tile: int = 256,
    compile: bool | None = None,
    format: str | None = None,
    on_error: str = "quarantine",
    restart: bool = False,
    verify: bool = False,
    progress: bool | None = None,
    ray_options: Mapping[str, object] | None = None,
    trust: Sequence[str] = (),
) -> "JobReport | pyarrow.Table":
    """Predict every row of files or tables of any size, with a few chunks in memory.

    model: a Predictor, or the folder of a saved one.
    data: a file or folder of CSV, Parquet, Arrow IPC or .npy, a folder of images, a pyarrow.Table, a pandas frame, a
    dict of columns, a NumPy array, a torch Dataset, or a source of `vbdl.batch.sources`.
    out: a file (.parquet, .csv, .arrow, .npy) or a folder for one part per chunk; None returns a pyarrow.Table.
    columns: output columns, see `vbdl.batch.output`. keep: input columns to copy to the output; from CSV files as text,
    unless schema or inputs name them. interval: level of the central interval in `lower` and `upper`.
    inputs: columns of a model that was not trained on a table, in its order; every column of numbers unless given.
    schema: the schema of a Predictor that was trained on a table and not saved.
    engine: "local", or "ray" for Ray (a cluster if there is one). workers: threads of the local engine, or actors of
    Ray. Results depend on neither, nor on chunk_rows.
    on_error: "quarantine" leaves out rows that cannot be used and lists them with reasons in a file beside the output;
    "stop" raises QuarantineError at the first.
    trust: packages that the network of a saved model may be imported from.
    restart: overwrite the output of another job. Without it a killed job is resumed, and parts that are missing or
    changed are computed again. verify: read every existing part to find changes, instead of those whose size or time
    has changed.

    Returns a `JobReport`, or the table. Raises ValueError if model, data and options do not fit together.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> predict = vbdl.Predictor(vbdl.DeepEnsemble(net, 4), vbdl.Categorical(), compile=False)
    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/rows.npy", np.zeros((10, 4), np.float32))
    ...     report = vbdl.predict_table(predict, f"{folder}/rows.npy", f"{folder}/out.csv")
    ...     len(open(f"{folder}/out.csv").readlines())  # a header and ten rows
    11
    """
    if on_error not in ("quarantine", "stop"):
        raise ValueError(f"on_error is 'quarantine' or 'stop', got {on_error!r}")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine is 'local' or 'ray', got {engine!r}")
    options = JobOptions(
        columns=None if columns is None else tuple(columns),
        keep=tuple(keep),
        interval=interval,
        inputs=None if inputs is None else tuple(inputs),
        tile=tile,
        compile=compile,
        chunk_rows=chunk_rows,
        trust=tuple(trust),
    )
    schema = schema or schema_at(model)
    sources = tuple(sources_of(data, schema, options, image_row(model)))
    if compile is None:
        options = dataclasses.replace(options, compile=can_compile() and _large(sources))
    job, versions = Job(model, sources, options, schema), Versions(sources)
    if out is None:
        return _predict_in_memory(job, versions, workers, on_error, progress)
    out = Path(out)
    kind, folder = _layout(out, format)
    _apart(data, out)
    settings: JobRecord = json.loads(json.dumps(job.recorded(kind)))
    begun = time.monotonic()
    merged, damaged, replace = None if folder == out else Merged(out), [], restart
    if folder != out and folder.is_symlink():
        raise ValueError(f"{folder} is a link, but the job needs a folder of that name for unfinished parts: remove it")
    if merged is not None and not restart:
        if merged.about is not None and merged.about["settings"] == settings:
            damaged, replace = merged.damaged(verify), True
            if not damaged:
                discard(folder, settings)
                return report_of(merged.about, 0.0, len(merged.about["parts"]), out, merged.quarantine_path, [])
        elif not _is_finished(folder, settings):
            merged.check_free(settings)
    parts = Folder(folder, settings, kind, restart, named=folder != out and len(sources) > 1, verify=verify)
    try:
        resumed = len(parts.done)
        damaged += parts.damaged
        if parts.finished is None:
            run = Run(settle(job), parts, on_error, progress)
            with versions.named_in_errors():
                if engine == "ray":
                    from vbdl.batch.ray import run_ray

                    run_ray(run, workers, dict(ray_options or {}))
                else:
                    run_local(run, workers)
            for source in versions.changed():
                parts.failed.pop(source.name, None)  # the change made the file unreadable
                again = "Predict it again, with restart=True (--restart)"
                run.fail(source.name, ValueError(f"{source.name} {CHANGED} {again}"))
        manifest = parts.finished or parts.finish([s.name for s in sources])
        quarantine = folder / QUARANTINE
        if merged is not None:
            manifest = merged.write(parts, replace)
            quarantine = merged.quarantine_path
            parts.remove()
    finally:
        parts.close()
    return report_of(manifest, time.monotonic() - begun, resumed, out, quarantine, damaged)


def _predict_in_memory(
    job: Job, versions: Versions, workers: int | None, on_error: str, progress: bool | None
) -> "pyarrow.Table":
    sink = TableSink(named=len(job.sources) > 1)
    run = Run(settle(job), sink, on_error, progress)
    with versions.named_in_errors():
        run_local(run, workers)
    for source in versions.changed():
        raise ValueError(f"{source.name} {CHANGED} Predict it again")
    return sink.table()


def _is_finished(folder: Path, settings: JobRecord) -> bool:
    """Whether the folder holds all parts of this job, because it was killed before they became one file."""
    records = read_records(folder, settings) if folder.is_dir() else None
    return records is not None and records.finished is not None and records.settings == settings


def _large(sources: Sequence[Source]) -> bool:
    rows = sum(s.count() or 0 for s in sources)
    sizes = (s.state().get("bytes") for s in sources if s.count() is None)
    size = sum(n for n in sizes if isinstance(n, int))
    return rows >= _ROWS_WORTH_COMPILING or size >= _BYTES_WORTH_COMPILING


def _layout(out: Path, kind: str | None) -> tuple[str, Path]:
    """Return (format, folder of parts): the output folder itself, or a hidden folder beside an output file."""
    by_name = {suffix: k for k, suffix in FORMATS.items()} | {".feather": "arrow"}
    suffix = by_name.get(out.suffix.lower())
    if suffix is not None and not out.is_dir():
        if kind not in (None, suffix):
            raise ValueError(f"{out} is named after {suffix}, and the format is {kind}")
        return suffix, out.with_name(f".{out.name}.parts")
    if out.is_file():
        raise ValueError(f"{out} is a file whose name ends in none of {', '.join(by_name)}")
    if out.suffix.lower() in _NOT_WRITTEN and not out.is_dir():
        raise ValueError(
            f"{out} is named after a file of another kind: a file ends in {', '.join(by_name)}, a folder in none"
        )
    return kind or "parquet", out


def _apart(data: object, out: Path) -> None:
    if not isinstance(data, str | Path):
        return
    source, target = Path(data).resolve(), out.resolve()
    if source == target or (source.is_dir() and target.is_relative_to(source)):
        raise ValueError(f"the output {out} is the input or lies in it: choose another place")
