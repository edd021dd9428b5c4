"""The engine of many machines: Ray Data hands out chunks, actors that hold the compiled predictor read, compute and
write them.

What travels is the description of a chunk and, back, the journal's entry of a part: rows go from the input's storage
to an actor and from there to the output's, which on several machines is storage that all of them see. An actor leaves
a part under a hidden name; the job notes it in the journal and gives it its name. Parts are the local engine's, written
by the same code, with the same bytes: nothing depends on the order in which actors finish,
vectors stay plain Arrow lists, and no reader meets a half-written file. Ray's own checkpoint (`CheckpointConfig`) is
not used, because it promises none of this; the folder's journal is what a killed job goes on from.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vbdl.batch.folder import Folder, write_part
from vbdl.batch.naming import part_name
from vbdl.batch.settling import Settled
from vbdl.batch.sources import Source
from vbdl.batch.table_file import TableFile
from vbdl.batch.worker import Misfit, Worker
from vbdl.batch.writing import with_source
from vbdl.engine import Predictor
from vbdl.tabular import Schema
from vbdl.tabular.reading import format_of

logger = logging.getLogger("vbdl")

INSTALL = "the engine 'ray' needs Ray 2.59 or later: pip install 'vbdl[ray]'"
_SPARE = 0.5  # of a CPU, left for what is no actor: with none left a job can wait for itself for ever
_STALLED = 600.0  # seconds without a part after which a job is given up


def run_ray(
    model: Any,
    schema: Schema | None,
    settled: Settled,
    job: Folder,
    workers: int | None,
    on_error: str,
    progress: bool | None,
    ray_options: Mapping[str, Any],
) -> None:
    """Every chunk that is not done, on Ray. workers: actors; all CPUs but one unless given.

    ray_options: for `ray.init`, where Ray is not running yet. ValueError where the actors could never start.
    """
    from vbdl.batch.predicting import _Rows, fail, stop_at

    sources, options = settled.sources, settled.options
    ray = _start(ray_options)
    workers, share, gpus = _resources(ray, workers)
    units = _units(sources, options.chunk_rows, job)
    with _Rows(sources, progress) as bar:
        for entry in job.done.values():
            bar.add(entry["rows"] + entry["rejected"], timed=False)
        if not units:
            return
        named = {s.name: s for s in sources}
        arguments = {
            "model": _portable(model), "schema": schema, "sources": named, "options": options, "kept": settled.kept,
            "folder": str(job.path.resolve()), "kind": job.kind, "named": job.named, "done": list(job.done),
            "gpu": gpus > 0, "on_error": on_error,
        }  # fmt: skip
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1 << 20  # descriptions are small: a block each, so that actors share them out
        data = ray.data.from_items([{"unit": json.dumps(u)} for u in units], override_num_blocks=len(units))
        made = data.map_batches(
            _Actor,
            fn_constructor_kwargs={"arguments": arguments},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
            num_cpus=share,
            num_gpus=gpus,
        )
        last = time.monotonic()
        for row in made.iter_rows():
            for found in json.loads(row["entries"]):
                last = time.monotonic()
                _settle(found, named, job, on_error, bar, fail, stop_at)
            if time.monotonic() - last > _STALLED:
                raise RuntimeError(f"no part was finished in {_STALLED:.0f} s: the job can be gone on with")


def _settle(found, named, job, on_error, bar, fail, stop_at) -> None:
    if "error" in found:
        raise ValueError(found["error"])
    source = named[found["source"]]
    if "failed" in found:
        fail(job, source, ValueError(found["failed"]), on_error)
        return
    stop_at(source, [tuple(r) for r in found["first"]], on_error)
    job.record(found["entry"])
    bar.add(found["entry"]["rows"] + found["entry"]["rejected"])


def _start(options: Mapping[str, Any]) -> Any:
    """Ray, its usage reports off; the cluster of RAY_ADDRESS, or one of this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error
    version = tuple(int(p) for p in ray.__version__.split(".")[:2])
    if version < (2, 59):  # tables with Ray's extension types ran code when they were read
        raise ValueError(f"{INSTALL}; this is {ray.__version__}")
    if not ray.is_initialized():
        given = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
        ray.init(**{**given, **options})
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


def _resources(ray: Any, workers: int | None) -> tuple[int, float, float]:
    """Actors, and the CPUs and GPUs of each. ValueError where they would wait for ever."""
    total = float(ray.cluster_resources().get("CPU", 0))
    free = float(ray.available_resources().get("CPU", 0))
    gpus = float(ray.cluster_resources().get("GPU", 0))
    if workers is None:
        workers = max(1, int(gpus) if gpus else int(total) - 1)
    if workers < 1:
        raise ValueError(f"workers is at least 1, got {workers}")
    share = min(1.0, (total - _SPARE) / workers)
    if share <= 0:
        raise ValueError(f"the cluster has {total:g} CPUs, and a job needs more than {_SPARE}")
    share = int(share * 10_000) / 10_000  # Ray counts in ten-thousandths
    if workers * share > free:
        raise ValueError(
            f"{workers} actors need {workers * share:.2g} CPUs and {free:g} of {total:g} are free: the job would wait "
            f"for other work on this cluster to end. Start it with fewer workers, or later"
        )
    return workers, share, gpus / workers if gpus else 0.0


def _units(sources: list[Source], size: int, job: Folder) -> list[dict[str, Any]]:
    """What an actor is given at a time: a chunk where a source can be entered at any row, else a whole source."""
    units = []
    for source in sources:
        entered_anywhere = not (isinstance(source, TableFile) and format_of(source.path) in ("csv", "ipc"))
        rows = source.count() if entered_anywhere else None
        if rows is None:
            units.append({"source": source.name, "chunk": None})
            continue
        wanted = [n for n in range(-(-rows // size)) if (source.name, n) not in job.done]
        units += [{"source": source.name, "chunk": n} for n in wanted]
    return units


def _portable(model: Any) -> Any:
    """A saved model by its folder, another as what it is made of."""
    if not isinstance(model, Predictor):
        return str(Path(model).resolve())
    settings = model.settings
    kept = {"memory_budget": settings.memory_budget, "chunk_size": settings.chunk_size, "autocast": settings.autocast}
    return model.posterior, model.likelihood, model.n_samples, model.seed, {**kept, "joint": settings.joint}


class _Actor:
    """Holds the predictor; takes descriptions of chunks, gives entries of the parts it has written."""

    def __init__(self, arguments: dict[str, Any]):
        import torch

        torch.set_num_threads(1)
        self.a = arguments
        model = arguments["model"]
        if isinstance(model, tuple):
            posterior, likelihood, n_samples, seed, settings = model
            model = Predictor(posterior, likelihood, n_samples, seed, **settings)
        self.worker = Worker(model, arguments["options"], arguments["schema"], kept=arguments["kept"])
        if arguments["gpu"]:
            self.worker.predictor = self.worker.predictor.replace(device="cuda")
        self.done = set(map(tuple, arguments["done"]))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = [entry for unit in batch["unit"] for entry in self._unit(json.loads(str(unit)))]
        return {"entries": [json.dumps(found)]}

    def _unit(self, unit: dict[str, Any]) -> list[dict[str, Any]]:
        name, wanted = unit["source"], unit["chunk"]
        source, size = self.a["sources"][name], self.a["options"].chunk_rows
        found: list[dict[str, Any]] = []

        def skip(number: int) -> bool:
            return (name, number) in self.done or (wanted is not None and number < wanted)

        try:
            for chunk in source.chunks(size, skip):
                try:
                    found.append(self._part(name, chunk))
                except ValueError as error:
                    said = f"{name}, rows {chunk.number * size} and after: {error}"
                    if not isinstance(error, Misfit):
                        return [{"error": said}]
                    found.append({"source": name, "failed": said})
                    break
                if wanted is not None:
                    break
        except (ValueError, OSError) as error:
            found.append({"source": name, "failed": str(error)})
        return found

    def _part(self, name: str, chunk: Any) -> dict[str, Any]:
        result = self.worker.compute(chunk)
        if self.a["on_error"] == "stop" and result.rejected:
            return {"source": name, "first": result.rejected[:1], "entry": None}
        part = part_name(name, chunk.number, self.a["kind"])
        folder, kind = Path(self.a["folder"]), self.a["kind"]
        table = result.table
        if self.a["named"]:
            table = with_source(table, name)
        entry = write_part(folder, part, kind, name, chunk.number, table, result.rejected, asdict(result.cells))
        return {"source": name, "first": result.rejected[:1], "entry": entry}
