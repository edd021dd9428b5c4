"""The table of methods that start from one trained network, beside those that train their own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vbdl.report.run import ScoreRecord, StoredRun

# score of classes, score of regressions
COLUMNS = (("accuracy", "rmse"), ("nll", "ll"), ("ece", "quantile_error"), ("brier", "crps"))


@dataclass(frozen=True)
class Line:
    """A result in the table; None where the result has no such value."""

    dataset: str
    method: str
    scores: list[ScoreRecord | None]  # of COLUMNS
    ood: list[ScoreRecord | None]  # AUROC by the total and by the epistemic uncertainty, mean over the sets
    network: float  # seconds of training of the networks it starts from, all splits
    own: float  # seconds of its own training, all splits
    prediction: float | None  # seconds for a thousand rows, after the first prediction


def lines(run: StoredRun) -> list[Line]:
    """A line for each result of the data sets on which a method started from a trained network; else none."""
    found = []
    for dataset in run.datasets:
        results = run.of(dataset)
        if not any(r.get("network_seconds") for r in results):
            continue
        for r in results:
            names = [regression if r["kind"] == "regression" else classes for classes, regression in COLUMNS]
            found.append(
                Line(
                    dataset,
                    r["method"],
                    [r["scores"].get(name) for name in names],
                    [_mean(r["ood"], part) for part in ("total", "epistemic")],
                    r.get("network_seconds", 0.0),
                    r["seconds"]["train"],
                    1000 / rate if (rate := r.get("warm_rows_a_second")) else None,
                )
            )
    return found


def _mean(sets: Mapping[str, Mapping[str, ScoreRecord]], part: str) -> ScoreRecord | None:
    """The mean of an AUROC over the out-of-distribution sets, with the standard error over the splits of this mean."""
    scores = [s[part] for s in sets.values() if part in s]
    if not scores or any(s["value"] is None for s in scores):
        return None
    splits = [sum(each) / len(scores) for each in zip(*(s["per_split"] for s in scores), strict=True)]
    mean, count = sum(splits) / len(splits), len(splits)
    error = math.sqrt(sum((v - mean) ** 2 for v in splits) / (count - 1) / count) if count > 1 else None
    return {"unit": "", "better": "higher", "value": mean, "standard_error": error, "per_split": splits}


def markdown(run: StoredRun) -> str:
    """The table in Markdown, for documents."""
    rows = [
        "| set | method | accuracy or RMSE | NLL | ECE or quantile error | Brier or CRPS | OOD AUROC, total "
        "| epistemic | network, s | own, s | 1000 rows, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in lines(run):
        nll = one.scores[1]
        if nll is not None and nll["better"] == "higher":  # a log-likelihood
            value = None if nll["value"] is None else -nll["value"]
            nll = {**nll, "value": value}
        scores = [one.scores[0], nll, *one.scores[2:], *one.ood]
        cells = [one.dataset, one.method, *map(_cell, scores)]
        cells += ["-" if seconds is None else f"{seconds:.2g}" for seconds in (one.network, one.own, one.prediction)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(score: ScoreRecord | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    error = score["standard_error"]
    return f"{score['value']:.3g}" if error is None else f"{score['value']:.3g} ± {error:.1g}"
