"""The demo from end to end: it trains, compares, prints, draws and saves."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from vbdl.demo import figures, table
from vbdl.demo.compare import Evaluated, evaluate, predictor
from vbdl.demo.data import TASKS, curve
from vbdl.demo.training import ENSEMBLE, METHODS, Trained, around_a_gap, single, train
from vbdl.progress import Progress


def run(
    out: Path,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    effort: float = 1.0,
    timed: bool = True,
    console: Console | None = None,
) -> list[Evaluated]:
    """Run the demo, write figures and models to `out`, and return the results of all tasks.

    tasks: names of data sets. effort: fraction of the epochs, for a quick look. timed: also measure speed, which
    compiles.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise ValueError(f"there is no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    if not effort > 0:
        raise ValueError(f"effort is a share of the training above 0, got {effort}")
    # report missing packages and a folder that cannot be written to before anything is trained
    figures.pyplot_or_error()
    loaded = [TASKS[name](seed) for name in tasks]
    out.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    begun = time.perf_counter()
    all_results: list[Evaluated] = []
    steps = 2 * len(loaded) * len(METHODS) + 2
    with Progress("vbdl demo", steps) as bar:
        for task in loaded:
            results = []
            for method in METHODS:
                trained = train(task, method, seed, effort)
                bar.advance(f"{task.name}: {method} trained, now compared")
                results.append(evaluate(trained, timed))
                if method == ENSEMBLE:
                    results.insert(0, evaluate(single(trained)))
                folder = out / "models" / f"{task.name}-{method}".replace(" ", "-").lower()
                predictor(trained, compile=True, seed=seed).save(folder, example=task.x["test"], overwrite=True)
                bar.advance(f"{task.name}: {method} done")
            all_results += results
        lines = around_a_gap(curve(seed), seed, effort)
        bar.advance("curve: trained")
        _draw(all_results, lines, out)
        bar.advance("figures drawn")
    for each in loaded:
        table.show([r for r in all_results if r.trained.task is each], console)
    table.note(all_results, console)
    pictures = len(list(out.glob("*.png")))
    console.print(
        f"{pictures} figures (PNG, SVG) in {out}, {len(loaded) * len(METHODS)} models in {out / 'models'}; "
        f"{time.perf_counter() - begun:.0f} s with {torch.get_num_threads()} thread(s), torch {torch.__version__}.",
        highlight=False,
        soft_wrap=True,
    )
    return all_results


def _draw(every: list[Evaluated], lines: list[Trained], out: Path) -> None:
    figures.bands(lines, out)
    for name in dict.fromkeys(r.trained.task.name for r in every):
        results = [r for r in every if r.trained.task.name == name]
        figures.histograms(results, out)
        if not results[0].trained.task.regression:
            figures.reliability(results, out)
        if name == "digits":
            figures.rotation(results, out)
