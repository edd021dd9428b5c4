"""The figures of a data set, drawn from the stored rows of its results, with a curve or panel for each method."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from torch import Tensor

from vbdl import former, metrics
from vbdl.report.run import RowsRecord
from vbdl.report.svg import Chart

BINS = 10
_CURVE = 60  # points of a curve


@dataclass(frozen=True)
class MethodRows:
    """The stored test rows of one method on one data set."""

    method: str
    style: str  # CSS class of its color, c0, c1, ...
    tensors: dict[str, Tensor]
    about: RowsRecord


def reliability(rows: Sequence[MethodRows]) -> Markup:
    """Plot the accuracy of the top label against its confidence, all splits together."""
    chart = Chart((0, 1), (0, 1), "stated confidence", "observed accuracy", "reliability diagram")
    chart.line([0, 1], [0, 1], "ideal", "ideal")
    for one in rows:
        confidence = one.tensors["confidence"].flatten().double().clamp(0, 1)
        hit = (one.tensors["predicted"] == one.tensors["label"]).flatten().double()
        x, y = _binned(confidence, hit)
        chart.line(x, y, one.style, one.method, dots=True)
    return chart.svg()


def _binned(p: Tensor, hit: Tensor) -> tuple[list[float], list[float]]:
    """(mean confidence, accuracy) of the equal-width bins with at least five rows."""
    number = (p * BINS).long().clamp_max(BINS - 1)
    xs, ys = [], []
    for b in range(BINS):
        inside = number == b
        if int(inside.sum()) >= 5:
            xs.append(float(p[inside].mean()))
            ys.append(float(hit[inside].mean()))
    return xs, ys


def quantiles(rows: Sequence[MethodRows]) -> Markup:
    """Plot the share of targets below each predicted quantile against its level, all splits together."""
    chart = Chart((0, 1), (0, 1), "level of the quantile", "share of targets below", "calibration of quantiles")
    chart.line([0, 1], [0, 1], "ideal", "ideal")
    levels = torch.linspace(0, 1, 21, dtype=torch.float64)
    for one in rows:
        pit = one.tensors["pit"].flatten().double()
        share = [float((pit <= level).double().mean()) for level in levels]
        chart.line(levels.tolist(), share, one.style, one.method)
    return chart.svg()


def risk_coverage(rows: Sequence[MethodRows], regression: bool) -> Markup:
    """Plot the mean loss of the kept rows against their share, if the most uncertain are rejected; mean of splits."""
    curves = []
    for one in rows:
        each = [metrics.risk_coverage(u, w) for u, w in zip(one.tensors["total"], one.tensors["loss"], strict=True)]
        risk = torch.stack([c.risk for c in each]).mean(0)
        coverage = each[0].coverage
        at = torch.linspace(0, len(risk) - 1, min(_CURVE, len(risk))).round().long()
        at = at[coverage[at] >= 0.05]  # the mean of a few rows is too noisy
        value = risk.sqrt() if regression else risk
        curves.append((one, coverage[at].tolist(), value[at].tolist()))
    top = max((max(y) for _, _, y in curves if y), default=1.0) or 1.0
    label = "root mean squared error of kept" if regression else "error of kept"
    chart = Chart((0, 1), (0, top * 1.08), "share of rows kept", label, "risk against coverage")
    for one, x, y in curves:
        chart.line(x, y, one.style, one.method)
    return chart.svg()


def histograms(one: MethodRows, ood: int, part: str = "total") -> Markup:
    """Plot histograms of the uncertainty of test rows and of out-of-distribution rows, as shares of each."""
    inside = one.tensors[part].flatten().double()
    outside = one.tensors[f"ood.{ood}.{part}"].flatten().double()
    top = max(float(torch.cat([inside, outside]).quantile(0.995)), 1e-9) if len(inside) < 1e6 else float(inside.max())
    edges = torch.linspace(0, top, 25, dtype=torch.float64)
    heights = []
    for values in (inside, outside):
        counts = torch.histc(values.clamp(0, top), bins=24, min=0, max=top)
        heights.append((counts / len(values)).tolist())
    unit = "nats" if "pit" not in one.tensors else "squared target units"
    high = max(max(h) for h in heights) * 1.08
    chart = Chart((0, top), (0, high), f"{part} uncertainty, {unit}", "share of rows", f"{one.method}: uncertainty")
    chart.bars(edges.tolist(), heights[0], "inside", "test rows")
    chart.bars(edges.tolist(), heights[1], "outside", one.about["ood"][ood])
    return chart.svg()


__getattr__ = former.names(__name__, {"Rows": "MethodRows"})
