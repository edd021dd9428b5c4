"""A run of `vbdl bench` on disk: a JSON line a result, and the rows behind each in safetensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

RESULTS, ABOUT = "results.jsonl", "run.json"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, the last of each data set and method; a line cut short by a crash is left out."""
    path = Path(folder) / RESULTS
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if not path.exists():
        return []
    for text in path.read_text().splitlines():
        try:
            result = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[result["dataset"], result["method"]] = result
    return list(found.values())


@dataclass
class StoredRun:
    """Results in the order of the file; failures apart."""

    folder: Path
    results: list[dict[str, Any]]
    failed: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "StoredRun":
        """ValueError where the folder holds no result."""
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

    def of(self, dataset: str) -> list[dict[str, Any]]:
        """The results of a data set, methods in the order of the run."""
        found = {r["method"]: r for r in self.results if r["dataset"] == dataset}
        return [found[m] for m in self.methods if m in found]

    def rows(self, result: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors by name, as vbdl/bench/rows.py names them, and what is said of them; None where the file is gone."""
        file = self.folder / result["file"]
        if not file.is_file():
            return None
        with safe_open(file, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("vbdl", "{}"))
            return {name: stored.get_tensor(name) for name in stored.keys()}, about  # noqa: SIM118
