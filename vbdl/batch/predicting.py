"""Predictions of whole tables, files and folders: `vbdl.predict_table` and `vbdl predict`."""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vbdl.batch import local
from vbdl.batch.deleting import discard
from vbdl.batch.finding import sources_of
from vbdl.batch.folder import Folder
from vbdl.batch.merging import Merged
from vbdl.batch.naming import FORMATS, QUARANTINE
from vbdl.batch.records import read_records
from vbdl.batch.report import Report as Report
from vbdl.batch.report import report_of
from vbdl.batch.settling import Settled, settle
from vbdl.batch.sources import Chunk, Source, printable, version_of
from vbdl.batch.worker import Options, Result, Worker, available, digest, image_row, plain, schema_at
from vbdl.batch.writing import with_source
from vbdl.compiler import can_compile
from vbdl.progress import Progress
from vbdl.tabular import Schema
from vbdl.tabular.reading import arrow

logger = logging.getLogger("vbdl")

_ROWS_WORTH_COMPILING = 200_000
_BYTES_WORTH_COMPILING = 50_000_000
_NOT_WRITTEN = (".gz", ".tsv", ".ipc", ".json", ".jsonl", ".txt", ".xlsx", ".zip")  # nobody calls a folder so


class QuarantineError(ValueError):
    """A row that could not be used, where that was to stop the job."""


def predict_table(
    model: Any,
    data: Any,
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
    ray_options: Mapping[str, Any] | None = None,
    trust: Sequence[str] = (),
) -> Any:
    """Predict every row, in memory of a few chunks.

    model: a Predictor, or the folder of a saved one.
    data: a file or folder of CSV, Parquet, Arrow IPC or .npy, a folder of images, a pyarrow.Table, a pandas frame, a
    dict of columns, a NumPy array, a torch Dataset, or a source of `vbdl.batch.sources`.
    out: a file (.parquet, .csv, .arrow, .npy) or a folder that gets a part a chunk; None returns a pyarrow.Table.
    columns: of the output, see `vbdl.batch.output`. keep: input columns to carry over, those of CSV files as the text
    that they are, where neither schema nor inputs name them. interval: level of the central
    interval in `lower` and `upper`. inputs: columns a plain network takes, in its order; every number unless given.
    schema: of a Predictor made from a table and not saved.
    engine: "local", or "ray" for Ray (a cluster, where one is there). workers: threads of the local engine, actors of
    Ray. Results depend on neither, nor on chunk_rows.
    on_error: "quarantine" leaves rows that cannot be used out and says why, in a file beside the output; "stop" raises
    QuarantineError at the first.
    trust: packages that a saved model may import its network from.
    restart: write the output again, where another job's is there. A job that was killed is gone on with by itself, and
    parts that are gone or changed are computed again. verify: read every part that is there to find that out, and not
    only those whose size or time has changed.

    Returns a `Report`, or the table. Raises ValueError where model, data and options do not fit.
    """
    if on_error not in ("quarantine", "stop"):
        raise ValueError(f"on_error is 'quarantine' or 'stop', got {on_error!r}")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine is 'local' or 'ray', got {engine!r}")
    options = Options(
        None if columns is None else tuple(columns),
        tuple(keep),
        interval,
        None if inputs is None else tuple(inputs),
        tile,
        compile,
        chunk_rows,
        tuple(trust),
    )
    schema = schema or schema_at(model)
    sources = sources_of(data, schema, options, image_row(model))
    versions = [version_of(s) for s in sources]
    if compile is None:
        options = dataclasses.replace(options, compile=can_compile() and _large(sources))
    if out is None:
        return _in_memory(
            model, sources, versions, settle(sources, options, schema), schema, workers, on_error, progress
        )
    out = Path(out)
    kind, folder = _layout(out, format)
    _apart(data, out)
    settings = {
        "model": digest(model),
        "schema": None if schema is None else schema.to_dict(),
        "input": [s.state() for s in sources],
        "options": plain(options),
        "format": kind,
        "torch": str(torch.__version__),
    }
    settings = json.loads(json.dumps(settings))
    begun = time.monotonic()
    merged, damaged, replace = None if folder == out else Merged(out), [], restart
    if folder != out and folder.is_symlink():
        raise ValueError(f"{folder} is a link, and the place for unfinished parts: remove it")
    if merged is not None and not restart:
        if merged.about is not None and merged.readable and merged.about["settings"] == settings:
            damaged, replace = merged.damaged(verify), True
            if not damaged:
                discard(folder, settings)
                return report_of(merged.about, 0.0, len(merged.about["parts"]), out, merged.quarantine_path, [])
        elif not _is_finished(folder, settings):
            merged.check_free(settings)
    job = Folder(folder, settings, kind, restart, named=folder != out and len(sources) > 1, verify=verify)
    try:
        resumed = len(job.done)
        damaged += job.damaged
        if job.finished is None:
            settled = settle(sources, options, schema)
            with _changes_named(sources, versions):
                if engine == "ray":
                    from vbdl.batch.ray import run_ray

                    run_ray(model, schema, settled, job, workers, on_error, progress, ray_options or {})
                else:
                    _run_local(model, schema, settled, job, workers, on_error, progress)
            for source in _changed(sources, versions):
                job.failed.pop(source.name, None)  # half a file that cannot be read is what the change looked like
                fail(job, source, ValueError(f"{source.name} {_CHANGED} {_AGAIN}"), on_error)
        manifest = job.finished or job.finish([s.name for s in sources])
        quarantine = folder / QUARANTINE
        if merged is not None:
            manifest = merged.write(job, replace)
            quarantine = merged.quarantine_path
            job.remove()
    finally:
        job.close()
    return report_of(manifest, time.monotonic() - begun, resumed, out, quarantine, damaged)


_CHANGED = "was changed or replaced while it was read: its predictions may be of two versions of it."
_AGAIN = "Predict it again, with restart=True (--restart)"


def _changed(sources: list[Source], versions: list[Any]) -> list[Source]:
    """Sources that are not what they were when the run began."""
    return [s for s, version in zip(sources, versions, strict=True) if version_of(s) != version]


@contextlib.contextmanager
def _changes_named(sources: list[Source], versions: list[Any]) -> Iterator[None]:
    """Raise the error that names a changed source in place of the one that reading half of it ended in."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        for source in _changed(sources, versions):
            raise ValueError(f"{source.name} {_CHANGED} Predict it again. Reading it ended in: {error}") from error
        raise


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether all parts of this job are there: a kill has come between them and the file."""
    found = read_records(folder, settings) if folder.is_dir() else None
    return found is not None and found.finished is not None and found.settings == settings


def _run_local(model, schema, settled: Settled, job: Folder, workers, on_error, progress) -> None:
    sources, options = settled.sources, settled.options
    with _threads(workers) as count:
        worker = Worker(model, options, schema, count, settled.kept)
        _compile(worker)
        with _Rows(sources, progress) as bar:
            for entry in job.done.values():
                bar.add(entry["rows"] + entry["rejected"], timed=False)

            def write(source: Source, chunk: Chunk, result: Result) -> None:
                stop_at(source, result.rejected, on_error)
                cells = dataclasses.asdict(result.cells)
                job.record(job.write(source.name, chunk.number, result.table, result.rejected, cells))
                bar.add(result.table.num_rows + len(result.rejected))

            local.run(
                worker, sources, lambda s, n: (s, n) in job.done, write,
                lambda s, e: fail(job, s, e, on_error), options.chunk_rows,
            )  # fmt: skip


def _in_memory(model, sources, versions, settled: Settled, schema, workers, on_error, progress) -> Any:
    tables: dict[tuple[str, int], Any] = {}
    rejected: list[tuple[int, str]] = []

    def write(source: Source, chunk: Chunk, result: Result) -> None:
        stop_at(source, result.rejected, on_error)
        tables[source.name, chunk.number] = result.table
        rejected.extend(result.rejected)
        bar.add(result.table.num_rows + len(result.rejected))

    def failed(source: Source, error: Exception) -> None:
        raise error

    with _threads(workers) as count:
        worker = Worker(model, settled.options, schema, count, settled.kept)
        _compile(worker)
        with _changes_named(sources, versions), _Rows(settled.sources, progress) as bar:
            local.run(worker, settled.sources, lambda s, n: False, write, failed, settled.options.chunk_rows)
    for source in _changed(sources, versions):
        raise ValueError(f"{source.name} {_CHANGED} Predict it again")
    if rejected:
        row, reason = rejected[0]
        logger.warning("%d rows could not be used and are not in the table; row %d: %s", len(rejected), row, reason)
    pa = arrow()
    with_rows = [(name, t) for (name, _), t in tables.items() if t.num_rows]
    with_rows = with_rows or [(name, t) for (name, _), t in tables.items()][:1]
    if len(sources) > 1:
        with_rows = [(name, with_source(t, name)) for name, t in with_rows]
    return pa.concat_tables([t for _, t in with_rows])


def _compile(worker: Worker) -> None:
    """Compile before anything is timed or queued, where the shape of a row is known."""
    if worker.options.compile and worker.schema is not None:
        samples = worker.options.interval > 0
        worker.predictor.warm_up((worker.options.tile,), example=worker.schema.example(), samples=samples)


def _large(sources: list[Source]) -> bool:
    rows = sum(s.count() or 0 for s in sources)
    size = sum(s.state().get("bytes", 0) for s in sources if s.count() is None)
    return rows >= _ROWS_WORTH_COMPILING or size >= _BYTES_WORTH_COMPILING


# -- the output


def _layout(out: Path, kind: str | None) -> tuple[str, Path]:
    """The format, and the folder of parts: the output itself, or a hidden one beside an output that is a file."""
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


def _apart(data: Any, out: Path) -> None:
    if not isinstance(data, str | Path):
        return
    source, target = Path(data).resolve(), out.resolve()
    if source == target or (source.is_dir() and target.is_relative_to(source)):
        raise ValueError(f"the output {out} is the input or lies in it: choose another place")


def stop_at(source: Source, rejected: list[tuple[int, str]], on_error: str) -> None:
    if rejected and on_error == "stop":
        row, reason = rejected[0]
        raise QuarantineError(f"{source.name}, row {row}: {reason}")


def fail(job: Folder, source: Source, error: Exception, on_error: str) -> None:
    """A source that cannot be read to its end, or does not fit: the others are, unless told to stop."""
    if on_error == "stop":
        raise error
    if source.name not in job.failed:  # once, where its chunks fail each by itself
        said = printable(" ".join(str(error).split()))
        logger.warning("%s: %s", source.name, said)
        job.failed[source.name] = said


class _Rows(Progress):
    """Rows done, rows a second, and the time left where the number of rows is known."""

    def __init__(self, sources: Sequence[Source], shown: bool | None):
        counts = [s.count() for s in sources]
        known = all(c is not None for c in counts)
        super().__init__("predicting", sum(c or 0 for c in counts) if known else 0, shown)
        self._timed = 0

    def __enter__(self) -> "_Rows":
        super().__enter__()
        return self

    def add(self, rows: int, timed: bool = True) -> None:
        self._timed += rows if timed else 0
        self.total = max(self.total, self.done + rows)
        passed = max(time.monotonic() - self._start, 1e-9)
        self.advance(f"{self._timed / passed:,.0f} rows/s", by=rows)


class _threads:
    """How many threads compute: each with one of torch's, so that they do not wait for each other."""

    def __init__(self, workers: int | None):
        if workers is not None and workers < 1:
            raise ValueError(f"workers is at least 1, got {workers}")
        self.count = workers or available()

    def __enter__(self) -> int:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)
        return self.count

    def __exit__(self, *error: Any) -> None:
        torch.set_num_threads(self.before)
