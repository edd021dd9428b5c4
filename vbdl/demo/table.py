"""Printing of the comparison as tables of 80 columns."""

from rich import box
from rich.console import Console
from rich.table import Table

from vbdl.demo.compare import ROWS, Evaluated
from vbdl.demo.training import SINGLE


def show(results: list[Evaluated], console: Console) -> None:
    """Print two tables for each task: scores with out-of-distribution detection, and speed."""
    task = results[0].trained.task
    console.print()
    console.print(
        f"[bold]{task.name}[/bold]: {len(task.y['train'])} training rows, {len(task.y['test'])} test rows; "
        f"OOD (out of distribution): {task.ood}",
        highlight=False,
    )
    console.print(_scores(results))
    if any(r.speed for r in results):
        console.print(_speeds([r for r in results if r.speed]))


def note(results: list[Evaluated], console: Console) -> None:
    """Print explanations of the tables' columns."""
    notes = [
        "NLL in nats a row; ECE: expected calibration error; quant. error: distance of the predicted quantiles' "
        "frequencies from their levels.",
        "Uncertainties are means over rows, in nats (classification) or squared target units (regression); "
        "alea: aleatoric, epis: epistemic.",
        "OOD AUROC: how well the epistemic uncertainty tells OOD from test rows; the total for the single network.",
    ]
    if any(r.speed for r in results):
        notes.append(
            f"Rows a second in batches of {ROWS}, medians of runs in turn; loop: one eager forward pass a draw. "
            "agree: the means of the loop's draws against vbdl's in standard errors, about 1 by chance; for the "
            "ensemble the largest relative difference."
        )
    for line in notes:
        console.print(f"[dim]{line}[/dim]", highlight=False)
    console.print()


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _scores(results: list[Evaluated]) -> Table:
    task = results[0].trained.task
    first = "rmse" if task.regression else "accuracy"
    names = ("\nRMSE", "\nNLL", "quant.\nerror") if task.regression else ("accu-\nracy", "\nNLL", "\nECE")
    table = _table(
        (
            *names,
            "  test\ntotal",
            "test\n alea",
            "test\n epis",
            "   OOD\ntotal",
            "OOD\n alea",
            "OOD\n epis",
            "  OOD\nAUROC",
        )
    )
    best = {
        name: (max if name in ("accuracy", "auroc") else min)(r.scores[name] for r in results)
        for name in (first, "nll", "calibration", "auroc")
    }
    for r in results:
        alone = r.trained.method == SINGLE
        cells = [_marked(name, r.scores[name], best[name]) for name in (first, "nll", "calibration")]
        for where in ("test", "ood"):
            for part in ("total", "aleatoric", "epistemic"):
                value = r.scores[f"{where}_{part}"]
                cells.append("-" if alone and part == "epistemic" else _uncertainty(value, task.regression))
        table.add_row(r.trained.method, *cells, _marked("auroc", r.scores["auroc"], best["auroc"]))
    return table


def _speeds(results: list[Evaluated]) -> Table:
    names = (
        "\n  draws",
        "  loop\n   rows/s",
        "  vbdl\n   rows/s",
        "\n  ratio",
        "\n  agree",
        "compile\n(s, once)",
        "  train\n(s)",
    )
    table = _table(names)
    for r in results:
        s = r.speed
        assert s is not None
        table.add_row(
            r.trained.method,
            str(r.trained.n_samples or r.trained.posterior.n_members),
            f"{s.loop:,.0f}",
            f"{s.vbdl:,.0f}",
            f"{s.vbdl / s.loop:.1f}",
            f"{s.agreement:.0e}" if s.agreement < 0.01 else f"{s.agreement:.2f}",
            f"{s.compile_seconds:.1f}",
            f"{r.trained.seconds:.1f}",
        )
    return table


def _uncertainty(value: float, regression: bool) -> str:
    return f"{value:,.0f}" if regression else f"{value:.3f}"


def _marked(name: str, value: float, best: float) -> str:
    text = {"accuracy": f"{value:.1%}", "rmse": f"{value:.1f}", "auroc": f"{value:.2f}"}.get(name, f"{value:.3f}")
    return f"[bold]{text}[/bold]" if value == best else text
