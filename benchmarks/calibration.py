"""Reproduce published calibration errors of real networks, and the effects of Guo et al.

    python benchmarks/calibration.py --data ../shared/data

The inputs are the probabilities of 17 networks on the CIFAR-10 test set. Every calibrator is fitted on the first 5,000
rows and scored on the last 5,000. Only metrics and calibrators are used. It takes four minutes on one core.
"""

import argparse
import json
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from vbdl import calibration, metrics

METHODS = {
    "temperature": lambda: calibration.Temperature("probs"),
    "vector": calibration.VectorScaling,
    "matrix": calibration.MatrixScaling,
    "dirichlet": calibration.Dirichlet,
    "ETS": calibration.EnsembleTemperature,
    "beta": calibration.Beta,
    "isotonic": calibration.Isotonic,
    "histogram": calibration.Histogram,
    "hist. mass": lambda: calibration.Histogram(15, "mass"),
    "BBQ": calibration.BBQ,
}


def widmann(arrays, y: torch.Tensor, published: dict) -> dict:
    """The largest distance to the published ECE of 14 networks and SKCE of three."""
    print("Widmann et al. 2019, table of the 14 networks (ECE, all probabilities)")
    print(f"{'network':14s} {'published':>20s} {'here':>20s} {'difference':>11s}")
    worst = 0.0
    for name, row in published.items():
        probs = arrays[name]
        # the published figures are of the decimals in a CSV; the shortest decimal of each float32 is that one
        decimals = np.array([float(str(p)) for p in probs.ravel()]).reshape(probs.shape)
        here = metrics.joint_ece(torch.from_numpy(decimals), y)
        worst = max(worst, abs(here - row["ECE_uniform"]))
        print(f"{name:14s} {row['ECE_uniform']:20.16f} {here:20.16f} {here - row['ECE_uniform']:11.1e}")
    print(f"\n{'SKCE':14s} {'estimator':>10s} {'published':>15s} {'here':>15s} {'relative':>10s}")
    relative = 0.0
    for name in ("googlenet", "densenet121", "resnet_orig"):
        probs = torch.from_numpy(arrays[name])
        bandwidth = metrics.median_distance(probs)
        for estimator, key in (("biased", "b"), ("unbiased", "uq"), ("linear", "ul")):
            there = published[name][f"SKCE{key}_median"]
            here = metrics.skce(probs, y, estimator, bandwidth)
            relative = max(relative, abs(here / there - 1))
            print(f"{name:14s} {estimator:>10s} {there:15.8e} {here:15.8e} {here / there - 1:10.1e}")
    return {"ece_joint_worst": worst, "skce_worst_relative": relative}


def guo(arrays, y: torch.Tensor, reference: dict, guo_table: dict) -> dict:
    """The ECE of every network before and after every calibrator, and of the mean of 14 networks."""
    named = {n: torch.from_numpy(arrays[n]) for n in arrays.files if n != "y"}
    fourteen = [p.double() for n, p in named.items() if not n.endswith(("_netcal", "_kumar"))]
    assert len(named) == 17 and len(fourteen) == 14
    named["mean of 14"] = torch.stack(fourteen).mean(0)
    print("\nECE % of the top label (15 bins), last 5,000 rows; calibrators fitted on the first 5,000")
    print(f"{'network':20s} {'none':>10s}" + "".join(f"{m:>12s}" for m in METHODS) + f"{'published':>10s}")
    eces: dict[str, list[float]] = {m: [] for m in ("none", *METHODS)}
    nll: dict[str, list[float]] = {m: [] for m in ("none", *METHODS)}
    worst = seconds = 0.0
    kept = True
    for name, probs in named.items():
        new, labels = probs[5000:], y[5000:]
        row = [metrics.ece(new, labels)]
        eces["none"].append(row[0])
        nll["none"].append(float(metrics.categorical_nll(new, labels).mean()))
        for method, make in METHODS.items():
            calibrator = make()
            # log p is a logit vector; a constant of each row is lost, which vector and matrix scaling notice
            logits = calibrator.acts_on == "logits"
            x = probs.clamp_min(1e-38).log() if logits else probs
            begun = time.perf_counter()
            after = calibrator.fit(x[:5000], y[:5000])(x[5000:])
            seconds += time.perf_counter() - begun
            after = after.double().softmax(1) if logits else after
            row.append(metrics.ece(after, labels))
            eces[method].append(row[-1])
            nll[method].append(float(metrics.categorical_nll(after, labels).mean()))
            if method == "temperature":
                kept &= metrics.accuracy(after, labels) == metrics.accuracy(new, labels)
        column = reference.get(f"cifar10/{name}", {}).get("ece15_last5k_after", math.nan)
        if not math.isnan(column):
            worst = max(worst, abs(row[1] - column))
        print(
            f"{name:20s}"
            + f"{100 * row[0]:11.2f}"
            + "".join(f"{100 * v:12.2f}" for v in row[1:])
            + f"{100 * column:10.2f}"
        )
    median = {m: float(np.median(v[:17])) for m, v in eces.items()}
    print(
        f"{'median of the 17':20s}"
        + f"{100 * median['none']:11.2f}"
        + "".join(f"{100 * median[m]:12.2f}" for m in METHODS)
    )
    mean_nll = {m: float(np.mean(v[:17])) for m, v in nll.items()}
    print(f"{'mean NLL, nats':20s}" + f"{mean_nll['none']:11.4f}" + "".join(f"{mean_nll[m]:12.4f}" for m in METHODS))
    lower = {m: sum(a < b for a, b in zip(eces[m][:17], eces["none"][:17], strict=True)) for m in METHODS}
    print(f"{'lower than none, of 17':20s}" + " " * 9 + "".join(f"{lower[m]:12d}" for m in METHODS))
    print(
        f"\ntemperature: at most {100 * worst:.4f} percentage points from the published column; accuracy kept: {kept}"
    )
    effects(median, guo_table)
    ensemble = {m: v[17] for m, v in eces.items()}
    return {
        "ece_median": median,
        "nll_mean": mean_nll,
        "temperature_worst_percentage_points": 100 * worst,
        "temperature_keeps_accuracy": kept,
        "mean_of_14_ece": ensemble,
        "mean_of_14_nll": {m: v[17] for m, v in nll.items()},
        "fit_and_apply_seconds": seconds,
    }


GUO = {  # column of the paper's table 1: name here
    "none": "Uncalibrated",
    "temperature": "Temp. Scaling",
    "vector": "Vector Scaling",
    "matrix": "Matrix Scaling",
    "BBQ": "BBQ",
    "histogram": "Hist. Binning",
    "isotonic": "Isotonic",
}


def effects(median: dict[str, float], guo_table: dict) -> None:
    """The order and size of the effects beside those of the paper, medians over networks."""
    rows = [row for name, row in guo_table["ece_percent"].items() if name.startswith("CIFAR-10/")]
    there = {m: float(np.median([row[column] for row in rows])) for m, column in GUO.items()}
    print(f"\nGuo et al. 2017, table 1: medians of their {len(rows)} CIFAR-10 networks and of the 17 here")
    print(f"{'':14s} {'ECE % there':>12s} {'ratio':>7s} {'rank':>5s} {'ECE % here':>12s} {'ratio':>7s} {'rank':>5s}")
    rank = lambda values, m: 1 + sum(v < values[m] for k, v in values.items() if k != "none")
    here = {m: 100 * median[m] for m in GUO}
    for m in GUO:
        places = ("", "") if m == "none" else (rank(there, m), rank(here, m))
        print(
            f"{m:14s} {there[m]:12.2f} {there[m] / there['none']:7.2f} {places[0]:>5} {here[m]:12.2f} "
            f"{here[m] / here['none']:7.2f} {places[1]:>5}"
        )


def conformal(arrays, y: torch.Tensor) -> dict:
    """The coverage of 90 % sets over 200 random splits, compared with its exact distribution."""
    from scipy import stats

    print("\n90 % conformal sets of resnet18, 200 splits, 1,000 rows scored in each")
    print(f"{'score':8s} {'n':>5s} {'coverage':>9s} {'exact mean':>11s} {'z':>6s} {'set size':>9s}")
    probs = torch.from_numpy(arrays["resnet18"])
    rows = []
    scores = {"LAC": calibration.LAC(), "APS": calibration.APS(True), "RAPS": calibration.RAPS(0.01, 3, True)}
    for name, score in scores.items():
        for n in (20, 100, 1000):
            covered, size = [], []
            for split in range(200):
                generator = torch.Generator().manual_seed(split)
                order = torch.randperm(10_000, generator=generator)
                u = torch.rand(10_000, generator=generator)
                fit, new = order[:n], order[n : n + 1000]
                sets = calibration.ConformalSets(0.1, score).fit(probs[fit], y[fit], u[fit])(probs[new], u[new])
                covered.append(int(calibration.set_coverage(sets, y[new]).sum()))
                size.append(float(sets.sum(1).double().mean()))
            k = calibration.conformal_rank(n, 0.1)
            law = stats.betabinom(1000, k, n + 1 - k)
            z = (np.mean(covered) - law.mean()) / (law.std() / math.sqrt(200))
            print(f"{name:8s} {n:5d} {np.mean(covered) / 1000:9.4f} {k / (n + 1):11.4f} {z:6.2f} {np.mean(size):9.3f}")
            rows.append({"score": name, "n": n, "coverage": np.mean(covered) / 1000, "exact": k / (n + 1), "z": z})
    return {"conformal": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("VBDL_DATA", "../shared/data"), type=Path)
    folder = parser.parse_args().data / "cifar_probs"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: give --data or set VBDL_DATA")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    arrays = np.load(folder / "cifar10_test_probs.npz")
    y = torch.from_numpy(arrays["y"].astype(np.int64))
    published = json.loads((folder / "published_widmann2019.json").read_text())["errors"]
    reference = json.loads((folder / "reference_metrics_computed_here.json").read_text())["metrics"]
    guo_table = json.loads((folder.parent / "published_tables" / "calibration_guo2017.json").read_text())
    result = {**widmann(arrays, y, published), **guo(arrays, y, reference, guo_table), **conformal(arrays, y)}
    print(json.dumps(_finite(result), default=float))


def _finite(value):
    """Replace infinite numbers (from a likelihood of exactly 0) by None, because JSON has no infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
