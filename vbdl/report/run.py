"""Read a run of `vbdl bench`: a file with a JSON line for each result, and safetensors files of their test rows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from safetensors import safe_open
from torch import Tensor

RESULTS, ABOUT = "results.jsonl", "run.json"


class ScoreRecord(TypedDict):
    """A score of a method on a data set."""

    unit: str
    better: str  # "higher", "lower", or the best value as a number
    value: float | None  # mean over the splits; None if not finite
    standard_error: float | None
    per_split: list[float]


class PublishedRecord(TypedDict):
    """A value of a published table; see `vbdl.bench.Published`."""

    column: str
    metric: str
    mean: float
    standard_error: float
    source: str
    differs: NotRequired[str]
    per_split: list[float]


class ResultRecord(TypedDict):
    """The result of one method on one data set, a line of the file."""

    dataset: str
    method: str
    kind: str  # "regression" or "classification"
    about: str
    splits: int
    rows: dict[str, int]
    scores: dict[str, ScoreRecord]
    uncertainty: dict[str, dict[str, float]]
    ood: dict[str, dict[str, ScoreRecord]]
    seconds: dict[str, float]
    processor_seconds: NotRequired[float]
    network_seconds: NotRequired[float]  # of training the networks that the method starts from
    warm_rows_a_second: NotRequired[float | None]  # of predictions after the first
    published: list[PublishedRecord]
    notes: list[str]
    file: str
    seed: int
    effort: float
    samples: int | None
    machine: dict[str, object]
    versions: dict[str, str]
    commit: str | None
    uncommitted: bool
    finished: str
    error: NotRequired[str]


class RowsRecord(TypedDict):
    """The metadata of a result's stored rows: names of classes, columns and out-of-distribution sets."""

    ood: list[str]
    classes: list[str]
    columns: list[str] | None
    image: bool


def read_results(folder: Path) -> list[ResultRecord]:
    """Read the results of a run, the last of each data set and method; lines truncated by a crash are skipped."""
    path = Path(folder) / RESULTS
    last: dict[tuple[str, str], ResultRecord] = {}
    if not path.exists():
        return []
    for text in path.read_text().splitlines():
        try:
            result = json.loads(text)
        except json.JSONDecodeError:
            continue
        last[result["dataset"], result["method"]] = result
    return list(last.values())


@dataclass
class StoredRun:
    """A run on disk: its results in the order of the file, and its failures."""

    folder: Path
    results: list[ResultRecord]
    failed: list[ResultRecord]

    @classmethod
    def read(cls, folder: Path) -> "StoredRun":
        """Read the run in a folder; ValueError if the folder holds no result."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"the folder {folder} does not exist")
        every = read_results(folder)
        results = [r for r in every if "error" not in r]
        if not results:
            raise ValueError(
                f"{folder} holds no {RESULTS}, which `vbdl bench --out FOLDER` writes: a report is of such a run. "
                f"`vbdl evaluate` prints the scores of a model"
            )
        return cls(folder, results, [r for r in every if "error" in r])

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(r["dataset"] for r in self.results))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(r["method"] for r in self.results))

    def of(self, dataset: str) -> list[ResultRecord]:
        """The results of a data set, with methods in the order of the run."""
        by_method = {r["method"]: r for r in self.results if r["dataset"] == dataset}
        return [by_method[m] for m in self.methods if m in by_method]

    def rows(self, result: ResultRecord) -> tuple[dict[str, Tensor], RowsRecord] | None:
        """(tensors by name as in vbdl/bench/rows.py, their metadata) of a result, or None if the file is missing."""
        file = self.folder / result["file"]
        if not file.is_file():
            return None
        with safe_open(file, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("vbdl", "{}"))
            return {name: stored.get_tensor(name) for name in stored.keys()}, about  # noqa: SIM118
