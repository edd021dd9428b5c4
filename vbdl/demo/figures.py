"""The demo's figures, each saved as PNG and SVG. Colors are Okabe and Ito's, safe for color-blind readers."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vbdl import metrics
from vbdl.demo.compare import BINS, Evaluated, predictor
from vbdl.demo.data import INSTALL, curve_mean
from vbdl.demo.training import DROPOUT, ENSEMBLE, MEAN_FIELD, SINGLE, Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, GRAY, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555", "#56B4E9"
COLOR = {SINGLE: GRAY, DROPOUT: BLUE, MEAN_FIELD: GREEN, ENSEMBLE: VERMILION}


def pyplot_or_error() -> ModuleType:
    """Import matplotlib.pyplot for drawing to files. Raises ModuleNotFoundError that says what to install."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "figure.dpi": 120,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.edgecolor": "#888888",
            "legend.frameon": False,
            "svg.hashsalt": "vbdl",  # makes the SVG file reproducible
        }
    )
    return pyplot


def _save(figure: "Figure", out: Path, name: str) -> Path:
    path = out / f"{name}.png"
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", facecolor="white", metadata={"Date": None})
    pyplot_or_error().close(figure)
    return path


def bands(trained: Sequence[Trained], out: Path) -> Path:
    """Draw a curve and its two uncertainties, inside and outside of the training data; one panel per method."""
    pyplot = pyplot_or_error()
    task = trained[0].task
    x = task.x["ood"]
    at = x.flatten().numpy()
    figure, axes = pyplot.subplots(
        1, len(trained), figsize=(4.4 * len(trained), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, one in zip(axes[0], trained, strict=True):
        p = predictor(one, compile=False)(x)
        assert p.std is not None  # of a regression
        mean, noise, std = (t.flatten().numpy() for t in (p.mean, p.aleatoric.sqrt(), p.std))
        panel.fill_between(at, mean - 2 * std, mean + 2 * std, color=SKY, alpha=0.45, lw=0, label="± 2 std, total")
        panel.fill_between(
            at, mean - 2 * noise, mean + 2 * noise, color=ORANGE, alpha=0.6, lw=0, label="± 2 std, aleatoric (noise)"
        )
        panel.plot(at, curve_mean(x).flatten().numpy(), color="black", lw=1, ls=(0, (4, 3)), label="truth")
        panel.plot(at, mean, color=BLUE, lw=2, label="predictive mean")
        points = task.x["train"].flatten().numpy(), task.y["train"].flatten().numpy()
        panel.plot(*points, "o", ms=3, color="black", alpha=0.55, mew=0, label="training data")
        panel.set(title=one.method, xlabel="input x", xlim=(float(at[0]), float(at[-1])), ylim=(-3.6, 3.6))
    axes[0, 0].set_ylabel("target y")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(labels), fontsize=9.5)
    return _save(figure, out, "bands")


def reliability(results: Sequence[Evaluated], out: Path, n_bins: int = BINS) -> Path:
    """Draw accuracy against confidence, with 95 % intervals, in bins of at least three rows."""
    pyplot = pyplot_or_error()
    task = results[0].trained.task
    figure, axes = pyplot.subplots(
        2, len(results), figsize=(3.1 * len(results), 4.3), sharex=True, sharey="row", height_ratios=(4, 1),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, result in enumerate(results):
        method = result.trained.method
        error = metrics.CalibrationError(n_bins)
        assert result.test.probs is not None  # of classes
        error.update(result.test.probs, task.y["test"])
        diagram = error.reliability()
        filled = diagram.counts >= 3
        counts, confidence, frequency = (t[filled] for t in (diagram.counts, diagram.confidence, diagram.frequency))
        intervals = [
            metrics.proportion_interval(round(float(f * n)), int(n))
            for f, n in zip(frequency, counts.double(), strict=True)
        ]
        low = torch.tensor([max(0.0, float(f) - i.lower) for f, i in zip(frequency, intervals, strict=True)])
        high = torch.tensor([max(0.0, i.upper - float(f)) for f, i in zip(frequency, intervals, strict=True)])
        top, bottom = axes[:, column]
        top.plot([0, 1], [0, 1], color="black", lw=1, ls=(0, (4, 3)))
        points, error_bars = (confidence.numpy(), frequency.numpy()), torch.stack((low, high)).numpy()
        top.errorbar(*points, yerr=error_bars, fmt="o-", ms=5, lw=1.5, elinewidth=1, color=COLOR[method])
        top.set(title=method, ylim=(0, 1.03), xlim=(0, 1.03))
        top.text(0.97, 0.05, f"ECE {error.compute():.3f}", transform=top.transAxes, ha="right")
        middles, shares = (torch.arange(n_bins) + 0.5) / n_bins, diagram.counts / len(task.y["test"])
        bottom.bar(middles.numpy(), shares.numpy(), width=0.9 / n_bins, color=COLOR[method])
        bottom.set(xlabel="stated confidence")
    axes[0, 0].set_ylabel("observed accuracy")
    axes[1, 0].set_ylabel("share of\nrows")
    figure.suptitle(
        f"Reliability on {task.name}: calibrated where on the diagonal; bars are 95 % intervals", fontsize=11
    )
    return _save(figure, out, f"reliability-{_slug(task.name)}")


def histograms(results: Sequence[Evaluated], out: Path) -> Path:
    """Draw histograms of the total and epistemic uncertainty of test rows and of out-of-distribution rows."""
    pyplot = pyplot_or_error()
    task = results[0].trained.task
    scale, unit = task.y_std**2, task.unit
    figure, axes = pyplot.subplots(
        2, len(results), figsize=(3.1 * len(results), 4.8), sharex="row", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, part in enumerate(("total", "epistemic")):
        values = [tuple(getattr(p, part).flatten() * scale for p in (result.test, result.ood)) for result in results]
        edges = _edges([t for pair in values for t in pair])
        for column, (result, (test, ood)) in enumerate(zip(results, values, strict=True)):
            panel = axes[row, column]
            if row == 0:
                panel.set_title(result.trained.method)
            panel.set_xlabel(f"{part} uncertainty ({unit})")
            if part == "epistemic" and result.trained.method == SINGLE:
                text = "none: one network\nis one hypothesis"
                panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", color=GRAY)
                continue
            for t, style in (
                (test, {"fc": BLUE, "alpha": 0.65, "label": "test rows"}),
                (ood, {"fc": (0.9, 0.62, 0, 0.35), "ec": VERMILION, "lw": 1.5, "label": "out of distribution"}),
            ):
                weights = torch.full_like(t, 1 / len(t))
                panel.hist(
                    t.clamp_max(edges[-1]).numpy(), bins=edges, weights=weights.numpy(), histtype="stepfilled", **style
                )
            unknown = torch.cat([torch.zeros(len(test)), torch.ones(len(ood))]).bool()
            if float(torch.cat([test, ood]).std()) > 1e-6 * scale:
                auroc = metrics.auroc(torch.cat([test, ood]), unknown)
                panel.text(0.97, 0.94, f"AUROC {auroc:.2f}", transform=panel.transAxes, va="top", ha="right")
        axes[row, 0].set_ylabel("share of rows")
    figure.suptitle(f"{task.name.capitalize()}; out of distribution: {task.ood} (last bar: and above)", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=2)
    return _save(figure, out, f"uncertainty-{_slug(task.name)}")


def rotation(results: Sequence[Evaluated], out: Path, index: int = 5, n_angles: int = 19) -> Path:
    """Draw the uncertainty of the digits while they are rotated step by step by 180 degrees, and show one of them."""
    from scipy.ndimage import rotate

    pyplot = pyplot_or_error()
    task = results[0].trained.task
    x = task.x["test"]
    angles = torch.linspace(0, 180, n_angles)
    turned = torch.stack(
        [torch.from_numpy(rotate(x.numpy(), float(a), axes=(3, 2), reshape=False, order=1)) for a in angles]
    )  # (angles, batch, 1, 8, 8)
    figure = pyplot.figure(figsize=(9.2, 4.9), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 5.5))
    shown = list(range(0, n_angles, 2))
    strip = grid[0].subgridspec(1, len(shown))
    for place, k in enumerate(shown):
        cell = figure.add_subplot(strip[place])
        cell.imshow(turned[k, index, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    panels = grid[1].subgridspec(1, 3, wspace=0.05)
    below = [figure.add_subplot(panels[i]) for i in range(3)]
    for result in results:
        method = result.trained.method
        predict = predictor(result.trained, compile=False)
        p = predict(turned.flatten(0, 1))
        assert p.label is not None  # of classes
        right = (p.label.view(n_angles, -1) == task.y["test"]).double().mean(1)
        lines = (1 - right, p.total.view(n_angles, -1).mean(1), p.epistemic.view(n_angles, -1).mean(1))
        for panel, line in zip(below, lines, strict=True):
            if panel is below[2] and method == SINGLE:
                continue
            panel.plot(
                angles.numpy(),
                line.numpy(),
                color=COLOR[method],
                lw=2,
                label=method,
                ls="--" if method == SINGLE else "-",
            )
    for panel, title in zip(
        below, ("error rate", "total uncertainty (nats)", "epistemic uncertainty (nats)"), strict=True
    ):
        panel.set(title=title, xlabel="turned by (degrees)", xticks=[0, 45, 90, 135, 180], xlim=(0, 180))
        panel.set_ylim(bottom=0)
    handles, labels = below[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(labels))
    return _save(figure, out, "rotation")


def _edges(values: list[Tensor], n_bins: int = 24) -> list[float]:
    """Edges of equally wide bins over nearly all values; larger values are drawn in the last bin."""
    everything = torch.cat(values)
    low = min(0.0, float(everything.min()))
    high = max(float(everything.quantile(0.99)), low + 1e-6)
    return torch.linspace(low, high, n_bins + 1).tolist()


def _slug(name: str) -> str:
    return name.replace(" ", "-")
