"""Run the suite: train and score the missing results, and append each as a JSON line."""

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from vbdl import former
from vbdl.bench import registry, rows, scores
from vbdl.bench.provenance import provenance
from vbdl.bench.sizes import resized
from vbdl.bench.source import Source
from vbdl.bench.summary import EvaluatedRows, classified, regressed
from vbdl.bench.task import Each, Run, Stacked, Task
from vbdl.report.run import ABOUT, RESULTS, read_results
from vbdl.types import Json

FORMAT = 1
_NEED_HELD = ("temperature", "laplace-validation")  # methods that need held-out rows


@former.arguments(samples="n_samples")
@dataclass(frozen=True)
class SuiteSettings:
    """The settings common to all results of a run, which can be resumed only with the same settings."""

    seed: int = 0
    effort: float = 1.0
    n_samples: int | None = None
    protocol: str = "2016"
    rows: int | None = None
    splits: int | None = None
    hold_out: float = 0.0

    samples = former.attribute("samples", "n_samples")

    def stored(self) -> Json:
        """As the files of a run hold them: `n_samples` by its name in version 0.1."""
        common = {"seed": self.seed, "effort": self.effort, "samples": self.n_samples, "protocol": self.protocol}
        sizes = {"rows_at_most": self.rows, "splits_wanted": self.splits, "hold_out": self.hold_out}
        return common | {name: value for name, value in sizes.items() if value}


class Suite:
    """A run of methods on data sets, with results in the folder `out`."""

    def __init__(
        self,
        out: Path,
        datasets: Sequence[str],
        methods: Sequence[str],
        source: Source,
        settings: SuiteSettings,
        say: Callable[[str], None] = print,
        progress: bool | None = None,
        compile: bool | None = None,
    ):
        for kind, names, known in (
            ("data set", datasets, registry.DATASETS),
            ("method", methods, registry.METHODS),
        ):
            unknown = [n for n in names if n not in known]
            if unknown:
                raise ValueError(f"there is no {kind} {unknown[0]!r}; there are {', '.join(known)}")
        if not settings.effort > 0:
            raise ValueError(f"effort must be positive (a share of the epochs), got {settings.effort}")
        if not 0 <= settings.hold_out < 1:
            raise ValueError(f"hold_out must be a share of the training rows in [0, 1), got {settings.hold_out}")
        if any(number is not None and number < 1 for number in (settings.rows, settings.splits)):
            raise ValueError(f"rows and splits must be at least 1, got {settings.rows} and {settings.splits}")
        if not settings.hold_out and (needing := [m for m in methods if m in _NEED_HELD]):
            raise ValueError(f"{needing[0]} needs rows that training has not seen: give --hold-out 0.1")
        self.out, self.source, self.settings, self.say = Path(out), source, settings, say
        self.progress, self.compile = progress, compile
        self.made_with = provenance()  # at the start, because the checkout may change during the run
        self.wanted = [(d, m) for d in datasets for m in methods]

    def run(self) -> list[Json]:
        """Compute the missing results and return all, with those of earlier starts.

        A failure has the key "error" and is tried again next time. Raises DataMissingError before any training if a
        data set is not available, and ValueError if the folder holds a run with other settings.
        """
        done = self._open()
        pending = [pair for pair in self.wanted if pair not in done]
        if done:
            self.say(f"{self.out} already has {len(done)} results; {len(pending)} to go")
        for name in dict.fromkeys(d for d, _ in pending):
            self._task(name)  # raises for missing data before the first training
        self._kept: tuple[str, Task] | None = None
        begun = time.perf_counter()
        for number, (name, method) in enumerate(pending, start=1):
            task = self._loaded(name)
            result = self._one(task, name, method)
            self._append(result)
            done[name, method] = result
            spent = time.perf_counter() - begun
            self.say(f"[{number}/{len(pending)}] {line(result)}  ({spent / 60:.1f} min so far)")
        return [done[pair] for pair in self.wanted if pair in done]

    # -- one result

    def _task(self, name: str) -> Task:
        s = self.settings
        return resized(registry.DATASETS[name].make(self.source, s.protocol), s.rows, s.splits, s.hold_out)

    def _loaded(self, name: str) -> Task:
        """The task of a data set; only the last one is kept, because methods of a data set run one after the other."""
        if self._kept is None or self._kept[0] != name:
            self._kept = name, self._task(name)
        return self._kept[1]

    def _one(self, task: Task, name: str, method: str) -> Json:
        key = f"{name}.{method}"
        folder = self.out / "checkpoints" / key
        settings = self.settings
        networks = self.out / "networks" / f"{name}.safetensors"
        run = Run(settings.seed, settings.effort, settings.n_samples, self.compile, folder, networks, self.progress)
        result: Json = {"format": FORMAT, "dataset": name, "method": method, **settings.stored()}
        result |= {
            "suite": registry.DATASETS[name].suite,
            "kind": "regression" if task.regression else "classification",
            "about": task.about or registry.DATASETS[name].about,
            "protocol": task.protocol.name if task.protocol else None,
            "splits": task.n_splits,
            "rows": {"train": task.n_train, "held": task.n_held, "test": task.n_test},
        }
        resumed = folder.exists()  # if so, seconds counts only the time since the restart
        begun, processor = time.perf_counter(), _processor_seconds()
        try:
            trained = registry.METHODS[method].make(task, run)
            trained = Each(trained) if isinstance(trained, Sequence) else trained
            middle = time.perf_counter()
            test_rows = evaluate(task, trained, *task.test)
            ended = time.perf_counter()
            ood = {n: evaluate(task, trained, x) for n, x in task.ood.items()}
            again, outside = time.perf_counter() - ended, sum(x.shape[:2].numel() for x in task.ood.values())
        except Exception as error:  # any method, also a plugin's, must not end a run of hours
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return result | {"error": reason, "traceback": traceback.format_exc(), **self.made_with, "finished": _now()}
        every = scores.regression(task, test_rows) if task.regression else scores.classification(task, test_rows)
        file = Path("rows") / f"{key}.safetensors"
        rows.save(self.out / file, task, test_rows, ood)
        shutil.rmtree(folder, ignore_errors=True)
        tested = task.n_splits * task.n_test
        return result | {
            "draws": test_rows.draws,
            "scores": scores.plain(every),
            "uncertainty": {"test": _means(test_rows), **{n: _means(o) for n, o in ood.items()}},
            "ood": {n: scores.plain(scores.out_of_distribution(test_rows, o)) for n, o in ood.items()},
            "seconds": {"train": middle - begun - run.waited, "predict": ended - middle},
            "network_seconds": run.network_seconds,
            "processor_seconds": _processor_seconds() - processor,
            "resumed": resumed,
            "rows_a_second": tested / max(ended - middle, 1e-9),
            "warm_rows_a_second": outside / max(again, 1e-9) if outside else None,  # nothing is traced any more
            "published": [asdict(p) for p in task.published if p.method in ("", method)],
            "details": run.details,
            "notes": [*task.notes, *run.notes],
            "file": str(file),
            **self.made_with,
            "finished": _now(),
        }

    # -- the folder

    def _open(self) -> dict[tuple[str, str], Json]:
        """The results that the folder holds, by (data set, method); creates the folder if needed."""
        self.out.mkdir(parents=True, exist_ok=True)
        about, settings = self.out / ABOUT, self.settings.stored()
        if about.exists():
            before = json.loads(about.read_text())
            other = [n for n, v in settings.items() if before["settings"].get(n) != v]
            if other:
                was = ", ".join(f"{n} {before['settings'].get(n)}" for n in other)
                raise ValueError(f"{self.out} holds a run with {was}: continue with these, or give another --out")
        else:
            if (self.out / RESULTS).exists():
                raise ValueError(f"{self.out} has results but no {ABOUT}: give another --out")
            about.write_text(json.dumps({"format": FORMAT, "settings": settings, "started": _now()}) + "\n")
        results: dict[tuple[str, str], Json] = {}
        for result in read_results(self.out):
            file = self.out / result.get("file", "")
            if "error" not in result and file.is_file():
                results[result["dataset"], result["method"]] = {**result}
        return {pair: results[pair] for pair in self.wanted if pair in results}

    def _append(self, result: Json) -> None:
        """Append a result as a line; a line truncated by a crash is ended first, and readers skip it."""
        path = self.out / RESULTS
        cut_short = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write(("\n" if cut_short else "") + json.dumps(result, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def evaluate(task: Task, trained: Stacked | Each, x: torch.Tensor, y: torch.Tensor | None = None) -> EvaluatedRows:
    """Predict and summarize rows, (splits, rows, ...), with scores if their targets are given."""
    with torch.no_grad():
        if not task.regression:
            return classified(trained.parameters(x), y)
        target = None if y is None else y[..., 0]
        return regressed(trained.parameters(x), target, torch.tensor(task.scale), torch.tensor(task.center))


def line(result: Json) -> str:
    """A result as one line of text for the terminal."""
    name = f"{result['dataset']:15} {result['method']:14}"
    if "error" in result:
        return f"{name} FAILED: {result['error']}"
    shown = ("rmse", "ll", "crps") if result["kind"] == "regression" else ("accuracy", "nll", "ece")
    parts = []
    for metric in shown:
        score = result["scores"][metric]
        half = "" if score["standard_error"] is None else f" ± {score['standard_error']:.3g}"
        parts.append(f"{metric} {score['value']:.4g}{half}")
    return f"{name} {', '.join(parts)}; trained in {result['seconds']['train']:.0f} s"


def _means(rows: EvaluatedRows) -> dict[str, float]:
    return {part: float(vars(rows)[part].mean()) for part in ("total", "aleatoric", "epistemic")}


def _processor_seconds() -> float:
    """The CPU seconds of this process and its finished child processes, such as compilers."""
    return time.process_time() + sum(os.times()[2:4])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


__getattr__ = former.names(__name__, {"Settings": "SuiteSettings"})
