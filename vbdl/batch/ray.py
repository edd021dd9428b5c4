"""The engine for several machines: Ray Data distributes chunks to actors with a compiled predictor, which read, compute
and write them.

Ray carries only descriptions of chunks to the actors and journal entries of parts back. Actors read rows from the
input's storage and write to the output's storage, which all machines have to share. An actor writes a part under a
hidden name; the driver records it in the journal and renames it. The same code as in the local engine writes the parts,
with the same bytes: nothing depends on the order in which actors finish, vectors stay plain Arrow lists, and no reader
sees a half-written file. Ray's own checkpoint (`CheckpointConfig`) guarantees none of this and is not used; a killed
job is resumed from the folder's journal.
"""

import dataclasses
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypedDict

import numpy as np

from vbdl.batch.folder import Folder
from vbdl.batch.job import Job
from vbdl.batch.parts import PartWriter
from vbdl.batch.records import DraftEntry
from vbdl.batch.run import Run
from vbdl.batch.sources.source import Chunk
from vbdl.batch.sources.table_file import TableFile
from vbdl.batch.worker import Misfit, Worker
from vbdl.engine.predictor import Predictor
from vbdl.tabular.reading import format_of
from vbdl.types import Keywords

INSTALL = "the engine 'ray' needs Ray 2.59 or later: pip install 'vbdl[ray]'"
_SPARE = 0.5  # share of a CPU for tasks that are no actors: without it a job may wait for itself for ever
_STALLED = 600.0  # seconds without a finished part after which a job is ended


class Unit(TypedDict):
    """The work of one call of an actor: one chunk of a source, or the whole source if chunk is None."""

    source: str
    chunk: int | None


class Written(TypedDict):
    """The report of an actor on a chunk: the written part, or no part if the run stops at a rejected row."""

    source: str
    entry: DraftEntry | None
    rejected: list[tuple[int, str]]


class Failed(TypedDict):
    """The report of an actor on a source that could not be read to its end, or does not fit the model."""

    source: str
    failed: str


class Ended(TypedDict):
    """The report of an actor on an error that ends the run."""

    error: str


Outcome = Written | Failed | Ended


@dataclass(frozen=True)
class Assignment:
    """The description of a run, which every actor receives when it starts."""

    job: Job
    parts: PartWriter
    done: frozenset[tuple[str, int]]  # (source, chunk)
    stops: bool
    on_gpu: bool


def run_ray(run: Run[Folder], actors: int | None, options: Keywords) -> None:
    """Compute every chunk that is not done, on Ray.

    actors: their number; all CPUs but one unless given. options: arguments of `ray.init` if Ray is not running yet.
    Raises ValueError if the actors could never start.
    """
    ray = _start(options)
    actors, share, gpus = _resources(ray, actors)
    job, folder = run.job, run.sink
    units = _units(job, folder)
    with run:
        if not units:
            return
        model = job.model if isinstance(job.model, Predictor) else Path(job.model).resolve()
        assignment = Assignment(
            job=dataclasses.replace(job, model=model),
            parts=dataclasses.replace(folder.parts, folder=folder.path.resolve()),
            done=frozenset(folder.done),
            stops=run.stops,
            on_gpu=gpus > 0,
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1 << 20  # one small block per description, so that all actors get some
        data = ray.data.from_items([{"unit": json.dumps(u)} for u in units], override_num_blocks=len(units))
        computed = data.map_batches(
            _Actor,
            fn_constructor_kwargs={"assignment": assignment},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(units))),
            num_cpus=share,
            num_gpus=gpus,
        )
        last = time.monotonic()
        for row in computed.iter_rows():
            for outcome in json.loads(row["outcomes"]):
                last = time.monotonic()
                _settle(run, outcome)
            if time.monotonic() - last > _STALLED:
                raise RuntimeError(f"no part was finished in {_STALLED:.0f} s: start the same job again to resume it")


def _settle(run: Run[Folder], outcome: Outcome) -> None:
    if "error" in outcome:
        raise ValueError(outcome["error"])
    if "failed" in outcome:
        run.fail(outcome["source"], ValueError(outcome["failed"]))
        return
    run.check_rejected(outcome["source"], outcome["rejected"])
    entry = outcome["entry"]
    assert entry is not None
    run.sink.record(entry)
    run.count(entry["rows"] + entry["rejected"])


def _start(options: Keywords) -> ModuleType:
    """Return the module ray, connected to the cluster of RAY_ADDRESS or to a new local one, without usage reports."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error
    version = tuple(int(p) for p in ray.__version__.split(".")[:2])
    if version < (2, 59):  # older versions run code when they read tables with Ray's extension types
        raise ValueError(f"{INSTALL}; this is {ray.__version__}")
    if not ray.is_initialized():
        defaults = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
        ray.init(**{**defaults, **options})
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


def _resources(ray: ModuleType, actors: int | None) -> tuple[int, float, float]:
    """Return (actors, CPUs of each, GPUs of each). Raises ValueError if the actors would wait for ever."""
    total = float(ray.cluster_resources().get("CPU", 0))
    free = float(ray.available_resources().get("CPU", 0))
    gpus = float(ray.cluster_resources().get("GPU", 0))
    if actors is None:
        actors = max(1, int(gpus) if gpus else int(total) - 1)
    if actors < 1:
        raise ValueError(f"workers is at least 1, got {actors}")
    share = min(1.0, (total - _SPARE) / actors)
    if share <= 0:
        raise ValueError(f"the cluster has {total:g} CPUs, and a job needs more than {_SPARE}")
    share = int(share * 10_000) / 10_000  # Ray counts in ten-thousandths
    if actors * share > free:
        raise ValueError(
            f"{actors} actors need {actors * share:.2g} CPUs and {free:g} of {total:g} are free: the job would wait "
            f"for other work on this cluster to end. Start it with fewer workers, or later"
        )
    return actors, share, gpus / actors if gpus else 0.0


def _units(job: Job, folder: Folder) -> list[Unit]:
    """Return the chunks that are not done, or the whole source if it can only be read from the start."""
    units: list[Unit] = []
    for source in job.sources:
        entered_anywhere = not (isinstance(source, TableFile) and format_of(source.path) in ("csv", "ipc"))
        rows = source.count() if entered_anywhere else None
        if rows is None:
            units.append({"source": source.name, "chunk": None})
            continue
        chunks = range(-(-rows // job.options.chunk_rows))
        units += [Unit(source=source.name, chunk=n) for n in chunks if not folder.is_done(source.name, n)]
    return units


class _Actor:
    """An actor with a predictor, which computes and writes chunks and returns their journal entries."""

    def __init__(self, assignment: Assignment):
        import torch

        torch.set_num_threads(1)
        self._assignment, self._job = assignment, assignment.job
        self._sources = {source.name: source for source in self._job.sources}
        self._worker = Worker(self._job)
        if assignment.on_gpu:
            self._worker.predictor = self._worker.predictor.replace(device="cuda")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        outcomes = [outcome for unit in batch["unit"] for outcome in self._unit(json.loads(str(unit)))]
        return {"outcomes": [json.dumps(outcomes)]}

    def _unit(self, unit: Unit) -> list[Outcome]:
        name, wanted, size = unit["source"], unit["chunk"], self._job.options.chunk_rows
        outcomes: list[Outcome] = []

        def skip(number: int) -> bool:
            return (name, number) in self._assignment.done or (wanted is not None and number < wanted)

        try:
            for chunk in self._sources[name].chunks(size, skip):
                try:
                    outcomes.append(self._part(name, chunk))
                except ValueError as error:
                    message = f"{name}, rows {chunk.number * size} and after: {error}"
                    if not isinstance(error, Misfit):
                        return [{"error": message}]
                    outcomes.append({"source": name, "failed": message})
                    break
                if wanted is not None:
                    break
        except (ValueError, OSError) as error:
            outcomes.append({"source": name, "failed": str(error)})
        return outcomes

    def _part(self, name: str, chunk: Chunk) -> Outcome:
        result = self._worker.compute(chunk)
        if self._assignment.stops and result.rejected:
            return {"source": name, "entry": None, "rejected": result.rejected[:1]}
        entry = self._assignment.parts.write(name, chunk.number, result)
        return {"source": name, "entry": entry, "rejected": []}
