"""Speed and scaling, from JSON lines that the speed benchmarks write."""

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vbdl.report.svg import Chart


def _lines(file: Path | None) -> list[dict[str, Any]]:
    if file is None or not Path(file).is_file():
        return []
    found = []
    for text in Path(file).read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def table(file: Path | None) -> dict[str, Any] | None:
    """Cells of benchmarks/speed.py: seconds a call and the ratio to the loop, the last line of each cell.

    {"machine": ..., "cells": [(workload, batch, [line, ...]), ...]}, or None where there is no file. A file that is
    named and not there raises FileNotFoundError.
    """
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}")
    lines = [r for r in _lines(file) if "wall_s" in r]
    if not lines:
        return None
    cells: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for r in lines:
        cells.setdefault((r["workload"], r["batch"]), {})[r["contender"]] = r
    shown = [
        (workload, batch, sorted(found.values(), key=lambda r: r["wall_s"]))
        for (workload, batch), found in cells.items()
    ]
    return {"machine": lines[-1].get("machine", {}), "cells": shown}


def scaling(file: Path) -> list[tuple[str, Markup]]:
    """A chart of cost against each size that was varied, from `vbdl bench --scaling`."""
    lines = _lines(file)
    found = []
    for axis in dict.fromkeys(r["axis"] for r in lines):
        own = [r for r in lines if r["axis"] == axis]
        sizes, seconds = [r["size"] for r in own], [r["seconds"] for r in own]
        if len(set(sizes)) < 2:
            continue
        chart = Chart(
            (min(sizes), max(sizes)),
            (min(seconds) * 0.7, max(seconds) * 1.4),
            axis,
            "seconds a call",
            f"cost against {axis}",
            log_x=True,
            log_y=True,
        )
        for index, method in enumerate(dict.fromkeys(r["method"] for r in own)):
            points = sorted((r["size"], r["seconds"]) for r in own if r["method"] == method)
            chart.line([p[0] for p in points], [p[1] for p in points], f"c{index}", method, dots=True)
        found.append((axis, chart.svg()))
    return found
