"""Comparison of two runs, result by result: what became better or worse by more than chance."""

from dataclasses import dataclass, replace

import torch

from vbdl.report.run import ResultRecord, StoredRun
from vbdl.report.significance import Verdict, between

# scores of one split whose mean over the test rows is stored row by row, and so can be paired
_OF_ROWS = {"accuracy": "loss", "nll": "nll", "ll": "nll", "rmse": "loss", "crps": "crps"}


@dataclass(frozen=True)
class Change:
    """A score in both runs; the verdict is None if their values cannot be paired."""

    dataset: str
    method: str
    metric: str
    before: float
    after: float
    over: str  # "splits" or "rows"
    verdict: Verdict | None


@dataclass(frozen=True)
class Comparison:
    """Every score of the results that both runs have, and the results that only one has."""

    changes: list[Change]
    only_before: list[tuple[str, str]]
    only_after: list[tuple[str, str]]

    def said(self, word: str) -> list[Change]:
        """Changes of this verdict: "better", "worse" or "no difference found"."""
        return [c for c in self.changes if c.verdict is not None and c.verdict.word == word]


def compare_runs(before: StoredRun, after: StoredRun, alpha: float = 0.05) -> Comparison:
    """Paired t tests over the splits, or over the test rows where there is one split.

    alpha: of all tests together, by Holm's step-down (Scandinavian Journal of Statistics 6, 1979): the chance that
    any difference is called better or worse when none is there. ValueError where the runs share no result, or a
    data set's test rows differ between them.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha lies between 0 and 1, got {alpha}")
    a = {(r["dataset"], r["method"]): r for r in before.results}
    b = {(r["dataset"], r["method"]): r for r in after.results}
    shared = [pair for pair in a if pair in b]
    if not shared:
        raise ValueError(f"{before.folder} and {after.folder} share no data set and method")
    changes = [c for pair in shared for c in _changes(before, after, a[pair], b[pair])]
    return Comparison(_holm(changes, alpha), [p for p in a if p not in b], [p for p in b if p not in a])


def _changes(before: StoredRun, after: StoredRun, a: ResultRecord, b: ResultRecord) -> list[Change]:
    name = f"{a['dataset']} with {a['method']}"
    if (a["splits"], a["rows"]) != (b["splits"], b["rows"]):
        raise ValueError(
            f"{name}: {a['splits']} splits of {a['rows']} in one run, {b['splits']} of {b['rows']} in the other"
        )
    rows = None
    if a["splits"] == 1:
        rows = before.rows(a), after.rows(b)
        if rows[0] is not None and rows[1] is not None:
            key = "label" if "label" in rows[0][0] else "target"
            if not torch.equal(rows[0][0][key], rows[1][0][key]):
                raise ValueError(f"{name}: the runs have other test rows")
    changes = []
    for metric, ours in a["scores"].items():
        theirs = b["scores"].get(metric)
        if theirs is None or ours["value"] is None or theirs["value"] is None:
            continue
        verdict, over = None, "splits"
        if a["splits"] > 1:
            verdict = between(theirs["per_split"], ours["per_split"], ours["better"])
        elif rows is not None and rows[0] is not None and rows[1] is not None and metric in _OF_ROWS:
            over = "rows"
            verdict = _over_rows(rows[0][0][_OF_ROWS[metric]], rows[1][0][_OF_ROWS[metric]])
            if verdict is not None:
                verdict = replace(verdict, difference=theirs["value"] - ours["value"])
        changes.append(Change(a["dataset"], a["method"], metric, ours["value"], theirs["value"], over, verdict))
    return changes


def _over_rows(before: torch.Tensor, after: torch.Tensor) -> Verdict | None:
    """Paired over the rows of the one split; less of each row's loss is better."""
    return between(after[0].double().tolist(), before[0].double().tolist(), "lower")


def _holm(changes: list[Change], alpha: float) -> list[Change]:
    """The verdicts with p-values adjusted by Holm's method for the number of comparisons."""
    tested = sorted((c for c in changes if c.verdict is not None), key=lambda c: c.verdict.p_value)  # type: ignore[union-attr]
    p_values: dict[int, float] = {}
    highest = 0.0
    for place, change in enumerate(tested):
        assert change.verdict is not None
        highest = max(highest, min(1.0, change.verdict.p_value * (len(tested) - place)))
        p_values[id(change)] = highest
    adjusted = []
    for change in changes:
        if change.verdict is None:
            adjusted.append(change)
            continue
        p = p_values[id(change)]
        word = "no difference found" if p >= alpha else "better" if change.verdict.errors > 0 else "worse"
        adjusted.append(replace(change, verdict=replace(change.verdict, p_value=p, word=word)))
    return adjusted
