"""The report's sections on speed and scaling, from JSON lines of the speed benchmarks."""

import json
from pathlib import Path
from typing import TypedDict

from markupsafe import Markup

from vbdl.report.svg import Chart
from vbdl.types import Json


class SpeedTable(TypedDict):
    """The results of benchmarks/speed.py on one machine."""

    machine: Json
    cells: list[tuple[str, int, list[Json]]]  # (workload, batch, lines of the contenders, the fastest first)


def _lines(file: Path | None) -> list[Json]:
    if file is None or not Path(file).is_file():
        return []
    lines = []
    for text in Path(file).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def table(file: Path | None) -> SpeedTable | None:
    """Read the results of benchmarks/speed.py.

    A line has the seconds per call and the ratio to the loop of one contender; the last line of each is taken. Returns
    None if no file is given or it has no results; raises FileNotFoundError if the file does not exist.
    """
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"the file {file} does not exist")
    lines = [r for r in _lines(file) if "wall_s" in r]
    if not lines:
        return None
    cells: dict[tuple[str, int], dict[str, Json]] = {}
    for r in lines:
        cells.setdefault((r["workload"], r["batch"]), {})[r["contender"]] = r
    shown = [
        (workload, batch, sorted(contenders.values(), key=lambda r: r["wall_s"]))
        for (workload, batch), contenders in cells.items()
    ]
    return {"machine": lines[-1].get("machine", {}), "cells": shown}


_SHOWN = {"seconds": ("seconds a call", "Cost", 1.0), "bytes": ("MiB", "Memory", 2.0**20)}


def scaling(file: Path) -> list[tuple[str, list[str], Markup]]:
    """(title, methods, chart) of cost or memory against each varied size, from `vbdl bench --scaling`."""
    lines = [r for r in _lines(file) if r.get("quantity") in _SHOWN]
    methods = list(dict.fromkeys(r["method"] for r in lines))
    charts = []
    for quantity, axis in dict.fromkeys((r["quantity"], r["axis"]) for r in lines):
        varied = [r for r in lines if (r["quantity"], r["axis"]) == (quantity, axis)]
        label, what, unit = _SHOWN[quantity]
        sizes, values = [r["size"] for r in varied], [max(r["value"], 1e-9) / unit for r in varied]
        if len(set(sizes)) < 2:
            continue
        title = f"{what} against {_AXES.get(axis, axis)}"
        ends = (min(values) * 0.7, max(values) * 1.4)
        chart = Chart((min(sizes), max(sizes)), ends, axis, label, title, log_x=True, log_y=True)
        for index, method in enumerate(methods):
            points = sorted((s, v) for r, s, v in zip(varied, sizes, values, strict=True) if r["method"] == method)
            chart.line([p[0] for p in points], [p[1] for p in points], f"c{index}", method, dots=True)
        charts.append((title, methods, chart.svg()))
    return charts


_AXES = {"batch": "rows of a batch", "rows": "rows in all"}
