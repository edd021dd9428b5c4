"""Two figures of a fitted table on its test rows, as PNG and SVG: calibration, and risk against coverage."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vbdl import metrics
from vbdl.tabular.fitting import Fitted
from vbdl.tabular.reading import INSTALL
from vbdl.types import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#777777"


def draw(fitted: Fitted, folder: Path) -> list[Path]:
    """Draw the calibration and the risk-coverage curve on the test rows. Raises ModuleNotFoundError without
    matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "vbdl"
    x, y = fitted.test
    p = fitted.predictor(x, samples=fitted.schema.target.classes is None)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, panel in (("calibration", _calibration), ("risk-coverage", _risk)):
        figure, axes = pyplot.subplots(figsize=(4.6, 4.0), layout="constrained")
        panel(axes, p, y, fitted.schema.target.name)
        axes.spines[["top", "right"]].set_visible(False)
        for suffix in (".png", ".svg"):
            path = folder / f"{name}{suffix}"
            metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
            figure.savefig(path, dpi=130, facecolor="white", metadata=metadata)
        paths.append(folder / f"{name}.png")
        pyplot.close(figure)
    return paths


def _calibration(axes: "Axes", p: Prediction, y: Tensor, name: str) -> None:
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls=(0, (4, 3)))
    if p.probs is not None:
        stated, hit = p.probs.amax(1).double(), (p.probs.argmax(1) == y).double()
        for part in stated.argsort().tensor_split(max(2, min(10, len(y) // 15))):
            at, right, n = float(stated[part].mean()), float(hit[part].mean()), len(part)
            interval = metrics.proportion_interval(round(right * n), n)
            axes.plot([at, at], [interval.lower, interval.upper], color=_BLUE, lw=1)
            axes.plot(at, right, "o", color=_BLUE, ms=5)
        axes.set(
            xlabel="stated probability of the predicted class", ylabel="share that was right, 95 %", ylim=(0, 1.02)
        )
        return
    levels = p.cdf(y).flatten().double().sort().values
    axes.plot(levels, torch.linspace(0, 1, len(levels)), color=_BLUE, lw=2)
    axes.set(xlabel=f"stated probability that {name} is below", ylabel="share of rows below", xlim=(0, 1), ylim=(0, 1))


def _risk(axes: "Axes", p: Prediction, y: Tensor, name: str) -> None:
    if p.probs is not None:
        loss, label = (p.probs.argmax(1) != y).double(), "share wrong"
        uncertainty = p.total
    else:
        loss, label = (p.mean.flatten() - y.flatten()).abs().double(), f"mean error of {name}"
        uncertainty = p.total.flatten()
    order = uncertainty.argsort()
    share = torch.arange(1, len(y) + 1) / len(y)
    axes.plot(share, loss[order].cumsum(0) / torch.arange(1, len(y) + 1), color=_BLUE, lw=2, label="by uncertainty")
    axes.axhline(float(loss.mean()), color=_ORANGE, lw=1.5, label="at random")
    axes.set(xlabel="share of rows that are kept, the surest first", ylabel=label, xlim=(0, 1), ylim=(0, None))
    axes.legend(frameon=False)
