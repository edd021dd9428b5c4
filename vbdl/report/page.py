"""Write a run as one self-contained HTML page, which needs no other file and no network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from vbdl.report import figures, speed, trained
from vbdl.report.cases import Case, cases
from vbdl.report.run import PublishedRecord, ResultRecord, ScoreRecord, StoredRun
from vbdl.report.significance import Verdict, against_published, between

T = TypeVar("T")

_NAMES = {
    "rmse": "RMSE",
    "ll": "log-likelihood",
    "crps": "CRPS",
    "coverage90": "coverage of 90 %",
    "quantile_error": "quantile error",
    "aurc": "AURC",
    "accuracy": "accuracy",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
    "error80": "error of surest 80 %",
    "auroc": "AUROC",
    "cost": "cost a row",
}


@dataclass(frozen=True)
class Compared:
    """A result compared with one published column."""

    dataset: str
    method: str
    column: str
    source: str
    splits: int
    metrics: list[tuple[str, ScoreRecord, PublishedRecord, Verdict]]  # (name, score, published, verdict)
    notes: list[str]


@dataclass(frozen=True)
class Cell:
    """A cell in the table of a data set."""

    score: ScoreRecord
    best: bool
    worse_than_best: bool  # by a paired test over the splits


def write(folder: Path, out: Path | None = None, speed_file: Path | None = None) -> Path:
    """Write the page of a run and return its path.

    out: path of the page, FOLDER/report.html by default. speed_file: JSON lines of benchmarks/speed.py.
    Raises ValueError if the folder holds no result.
    """
    run = StoredRun.read(folder)
    out = run.folder / "report.html" if out is None else Path(out)
    html = render(run, speed_file)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html)
    return out


def render(run: StoredRun, speed_file: Path | None = None) -> str:
    """Render the page of a run as HTML."""
    environment = Environment(
        loader=PackageLoader("vbdl.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "metric": lambda n: _NAMES.get(n, n), "minutes": minutes, "p": p_value}
    styles = {m: f"c{i % 8}" for i, m in enumerate(run.methods)}
    published = [c for d in run.datasets for r in run.of(d) for c in _published(r)]
    first = run.results[0]
    settings = {"seed": first["seed"], "effort": first["effort"], "samples": first["samples"]}
    return environment.get_template("report.html.j2").render(
        run=run,
        settings=settings,
        styles=styles,
        commits=sorted({_commit(r) for r in run.results}),
        machines=_distinct([r["machine"] for r in run.results]),
        versions=_distinct([r["versions"] for r in run.results]),
        finished=max(r["finished"] for r in run.results),
        seconds=sum(sum(r["seconds"].values()) for r in run.results),
        processor_seconds=_total([r.get("processor_seconds") for r in run.results]),
        missing=[(d, m) for d in run.datasets for m in run.methods if not any(r["method"] == m for r in run.of(d))],
        published=published,
        trained=trained.lines(run),
        worse=[row for row in published if any(v.word == "worse" for _, _, _, v in row.metrics)],
        verdicts=_counts(published),
        sets=[_section(run, d, styles) for d in run.datasets],
        speed=speed.table(speed_file),
        scaling=speed.scaling(run.folder / "scaling.jsonl"),
    )


def _total(values: list[float | None]) -> float | None:
    """The sum of the values, or None if one is missing, as in older results."""
    return None if None in values else sum(f for f in values if f is not None)


def _commit(result: ResultRecord) -> str:
    return (result["commit"] or "none")[:10] + (" + changes" if result["uncommitted"] else "")


def number(value: float | None, digits: int = 3) -> str:
    """The value as text with `digits` significant digits, with an exponent only if very small or large."""
    if value is None:
        return "-"
    if abs(value) < 1e-12:  # zero up to rounding
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        places = max(0, digits - 1 - _exponent(value))
        return f"{value:,.{min(places, 7)}f}"
    return f"{value:.{digits - 1}e}"


def _exponent(value: float) -> int:
    return int(f"{abs(value):e}".partition("e")[2])


def minutes(seconds: float) -> str:
    """A time, given in seconds, as text in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def p_value(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def _distinct(records: Sequence[T]) -> list[T]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(r, sort_keys=True) for r in records)]


def _published(result: ResultRecord) -> list[Compared]:
    """The result compared with each published column, with all metrics of a column together."""
    compared = []
    for name in dict.fromkeys(p["column"] for p in result["published"]):
        metrics = []
        for column in result["published"]:
            score = result["scores"].get(column["metric"])
            if column["column"] == name and score is not None:
                verdict = against_published(score, column)
                if verdict is not None:
                    metrics.append((column["metric"], score, column, verdict))
        if metrics:
            first = metrics[0][2]
            notes = [n for n in (first.get("differs"), *result["notes"]) if n]
            args = (result["dataset"], result["method"], name, first["source"], result["splits"], metrics, notes)
            compared.append(Compared(*args))
    return compared


def _counts(published: list[Compared]) -> dict[str, dict[str, int]]:
    """The number of results with each verdict: {metric: {verdict: count}}."""
    by_metric: dict[str, dict[str, int]] = {}
    for row in published:
        for name, _, _, verdict in row.metrics:
            counts = by_metric.setdefault(name, {"better": 0, "no difference found": 0, "worse": 0})
            counts[verdict.word] += 1
    return by_metric


def _section(run: StoredRun, dataset: str, styles: dict[str, str]) -> dict[str, object]:
    results = run.of(dataset)
    regression = results[0]["kind"] == "regression"
    loaded = [(r, run.rows(r)) for r in results]
    rows = [figures.MethodRows(r["method"], styles[r["method"]], *stored) for r, stored in loaded if stored is not None]
    drawn = []
    if rows:
        first = ("Calibration", figures.quantiles(rows)) if regression else ("Reliability", figures.reliability(rows))
        drawn = [first, ("Risk against coverage", figures.risk_coverage(rows, regression))]
    ood = []
    for index, name in enumerate(rows[0].about["ood"] if rows else []):
        areas = [(r["method"], r["ood"].get(name, {}), r["uncertainty"]) for r in results]
        ood.append((name, areas, [(one.method, figures.histograms(one, index)) for one in rows]))
    return {
        "name": dataset,
        "about": results[0]["about"],
        "result": results[0],
        "results": results,
        "regression": regression,
        "table": _table(results),
        "figures": drawn,
        "ood": ood,
        "cases": [(one.method, cases(one.tensors, one.about)) for one in rows],
        "notes": list(dict.fromkeys(note for r in results for note in r["notes"])),
    }


def _table(results: Sequence[ResultRecord]) -> list[tuple[str, str, list[tuple[str, Cell | None]]]]:
    """The rows (metric, unit, [(method, cell)]) of a table, with the best cell and those significantly worse."""
    metrics = dict.fromkeys(name for r in results for name in r["scores"])
    lines = []
    for name in metrics:
        scored = {r["method"]: r["scores"][name] for r in results if name in r["scores"]}
        first = next(iter(scored.values()))
        known = {m: s for m, s in scored.items() if s["value"] is not None}
        best = max(known, key=lambda m: _good(known[m])) if known else None
        cells: list[tuple[str, Cell | None]] = []
        for r in results:
            score = scored.get(r["method"])
            if score is None:
                cells.append((r["method"], None))
                continue
            worse = False
            if best is not None and r["method"] != best:
                verdict = between(score["per_split"], scored[best]["per_split"], first["better"], alpha=0.05)
                worse = verdict is not None and verdict.word == "worse"
            cells.append((r["method"], Cell(score, r["method"] == best and len(results) > 1, worse)))
        lines.append((name, first["unit"], cells))
    return lines


def _good(score: ScoreRecord) -> float:
    value = score["value"]
    assert value is not None
    if score["better"] in ("higher", "lower"):
        return value if score["better"] == "higher" else -value
    return -abs(value - float(score["better"]))


__all__ = ["Case", "render", "write"]
