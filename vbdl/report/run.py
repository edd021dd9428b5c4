"""A run of `vbdl bench` on disk: a JSON line a result, and the rows behind each in safetensors."""

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
    better: str  # "higher", "lower", or the number that is best
    value: float | None  # the mean over the splits; None where it is not finite
    standard_error: float | None
    per_split: list[float]


class PublishedRecord(TypedDict):
    """A number of a published table, see `vbdl.bench.Published`."""

    column: str
    metric: str
    mean: float
    standard_error: float
    source: str
    differs: NotRequired[str]
    per_split: list[float]


class ResultRecord(TypedDict):
    """A line of a run: one method on one data set."""

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
    """The names of the classes, the columns and the out-of-distribution sets of the rows behind a result."""

    ood: list[str]
    classes: list[str]
    columns: list[str] | None
    image: bool


def read_results(folder: Path) -> list[ResultRecord]:
    """The lines of a run, the last of each data set and method; a line cut short by a crash is left out."""
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
    """The results of a run in the order of its file, and the failures apart from them."""

    folder: Path
    results: list[ResultRecord]
    failed: list[ResultRecord]

    @classmethod
    def read(cls, folder: Path) -> "StoredRun":
        """Read the run in a folder. Raises ValueError if the folder holds no result."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        every = read_results(folder)
        results = [r for r in every if "error" not in r]
        if not results:
            raise ValueError(f"{folder} holds no result: `vbdl bench --out {folder}` writes {RESULTS} there")
        return cls(folder, results, [r for r in every if "error" in r])

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(r["dataset"] for r in self.results))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(r["method"] for r in self.results))

    def of(self, dataset: str) -> list[ResultRecord]:
        """The results of a data set, methods in the order of the run."""
        by_method = {r["method"]: r for r in self.results if r["dataset"] == dataset}
        return [by_method[m] for m in self.methods if m in by_method]

    def rows(self, result: ResultRecord) -> tuple[dict[str, Tensor], RowsRecord] | None:
        """Tensors by name, as vbdl/bench/rows.py names them, and what is said of them; None where the file is gone."""
        file = self.folder / result["file"]
        if not file.is_file():
            return None
        with safe_open(file, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("vbdl", "{}"))
            return {name: stored.get_tensor(name) for name in stored.keys()}, about  # noqa: SIM118
