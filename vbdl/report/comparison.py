"""Compare two runs result by result: which scores became significantly better or worse."""

from dataclasses import dataclass, replace

import torch

from vbdl.report.run import ResultRecord, StoredRun
from vbdl.report.significance import Verdict, between

# metric -> stored tensor of the test rows' values, which can be paired if a run has a single split
_OF_ROWS = {"accuracy": "loss", "nll": "nll", "ll": "nll", "rmse": "loss", "crps": "crps"}


@dataclass(frozen=True)
class Change:
    """A score in both runs; its verdict is None if the values cannot be paired."""

    dataset: str
    method: str
    metric: str
    before: float
    after: float
    over: str  # "splits" or "rows"
    verdict: Verdict | None


@dataclass(frozen=True)
class Comparison:
    """The scores of the results that both runs have, and the results that only one has."""

    changes: list[Change]
    only_before: list[tuple[str, str]]
    only_after: list[tuple[str, str]]

    def with_verdict(self, word: str) -> list[Change]:
        """The changes with this verdict: "better", "worse" or "no difference found"."""
        return [c for c in self.changes if c.verdict is not None and c.verdict.word == word]


def compare_runs(before: StoredRun, after: StoredRun, alpha: float = 0.05) -> Comparison:
    """Compare two runs by paired t tests over the splits, or over the test rows if there is a single split.

    alpha: probability that any difference is called better or worse if there is none, for all tests together by Holm's
        step-down method (Scandinavian Journal of Statistics 6, 1979).
    Raises ValueError if the runs share no result, or a data set's test rows differ between them.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    a = {(r["dataset"], r["method"]): r for r in before.results}
    b = {(r["dataset"], r["method"]): r for r in after.results}
    shared = [pair for pair in a if pair in b]
    if not shared:
        raise ValueError(f"{before.folder} and {after.folder} have no result of the same data set and method")
    changes = [c for pair in shared for c in _changes(before, after, a[pair], b[pair])]
    return Comparison(_holm(changes, alpha), [p for p in a if p not in b], [p for p in b if p not in a])


def _changes(before: StoredRun, after: StoredRun, a: ResultRecord, b: ResultRecord) -> list[Change]:
    name = f"{a['dataset']} with {a['method']}"
    if (a["splits"], a["rows"]) != (b["splits"], b["rows"]):
        raise ValueError(
            f"{name} cannot be compared: one run has {a['splits']} splits of {a['rows']} rows, the other {b['splits']} "
            f"of {b['rows']}"
        )
    rows = None
    if a["splits"] == 1:
        rows = before.rows(a), after.rows(b)
        if rows[0] is not None and rows[1] is not None:
            key = "label" if "label" in rows[0][0] else "target"
            if not torch.equal(rows[0][0][key], rows[1][0][key]):
                raise ValueError(f"{name} cannot be compared: the runs have different test rows")
    changes = []
    for metric, score_before in a["scores"].items():
        score_after = b["scores"].get(metric)
        if score_after is None or score_before["value"] is None or score_after["value"] is None:
            continue
        verdict, over = None, "splits"
        if a["splits"] > 1:
            verdict = between(score_after["per_split"], score_before["per_split"], score_before["better"])
        elif rows is not None and rows[0] is not None and rows[1] is not None and metric in _OF_ROWS:
            over = "rows"
            verdict = _over_rows(rows[0][0][_OF_ROWS[metric]], rows[1][0][_OF_ROWS[metric]])
            if verdict is not None:
                verdict = replace(verdict, difference=score_after["value"] - score_before["value"])
        changes.append(
            Change(a["dataset"], a["method"], metric, score_before["value"], score_after["value"], over, verdict)
        )
    return changes


def _over_rows(before: torch.Tensor, after: torch.Tensor) -> Verdict | None:
    """The verdict of a paired test over the rows of the first split, (splits, rows) losses; lower is better."""
    return between(after[0].double().tolist(), before[0].double().tolist(), "lower")


def _holm(changes: list[Change], alpha: float) -> list[Change]:
    """The changes with p-values adjusted by Holm's method for the number of tests."""
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
