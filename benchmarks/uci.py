"""UCI regression on the standard splits: each method against the linear baseline and the published columns.

    python benchmarks/uci.py --data FOLDER [--sets boston ...] [--methods dropout ensemble mean-field] [--out FILE]

FOLDER (or the environment's VBDL_DATA) holds uci_regression/*.npz: features, targets, the 20 splits of
Hernandez-Lobato and Adams (2015), Gal's settings and per-split results (2018). All splits of a set are trained as
members of one stacked ensemble, each on its own rows. Prints a line and writes a JSON line for each set and method;
`--table FILE` prints a file of them as a table.

Protocols:
* dropout: Gal and Ghahramani's of 2018. One hidden layer of 50, dropout before every weight layer, squared error with
  weight decay l^2 (1 - p) / (2 N tau), Adam, batches of 128, 100 times n_epochs epochs; p and tau by the validation
  likelihood of the last 20 % of the training part, then trained again on all of it. Two deviations, in the search
  only: a network is trained once for each p, with the middle tau in its weight decay (1e-6 or less), not once for each
  pair; and for a quarter of the epochs.
* ensemble: Lakshminarayanan et al. (2017). Five members a split, two heads, batches of 100, the mixture's likelihood.
  40 epochs as printed; the printed learning rate (0.1) diverges in places, so 0.01.
* mean-field: this project's own settings, below; there is no protocol to follow.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import vbdl

SETS = ("boston", "concrete", "energy", "wine", "yacht")
METHODS = ("dropout", "ensemble", "mean-field")

# Deep Ensembles prints a standard deviation over the splits; here / sqrt(20), as the standard error of the mean
PUBLISHED = {
    "ensemble": {
        "boston": (-2.41, 0.25),
        "concrete": (-3.06, 0.18),
        "energy": (-1.38, 0.22),
        "wine": (-0.94, 0.12),
        "yacht": (-1.18, 0.21),
    }
}


class Splits:
    """A data set with every split standardised by its own training part, the copies one after the other."""

    def __init__(self, path: Path, fraction: float = 1.0):
        found = np.load(path, allow_pickle=False)
        self.settings = {k: found[k] for k in found.files if k not in ("X", "y", "perm")}
        x, y, permutation, n_train = found["X"], found["y"], found["perm"].astype(np.int64), int(found["n_train"])
        self.count, n = permutation.shape
        self.n_train, self.n_test = n_train, n - n_train
        self.scale, self.y_test = [], []
        inputs, targets = [], []
        for k in range(self.count):
            train, test = permutation[k, :n_train], permutation[k, n_train:]
            mean, std = x[train].mean(0), x[train].std(0)
            centre, scale = y[train].mean(), y[train].std()
            order = np.concatenate([train, test])
            inputs.append((x[order] - mean) / np.where(std == 0, 1.0, std))
            targets.append((y[order] - centre) / scale)
            self.scale.append(float(scale))
        self.x = torch.from_numpy(np.concatenate(inputs)).float()
        self.y = torch.from_numpy(np.concatenate(targets)).float().unsqueeze(1)
        self.offset = torch.arange(self.count).unsqueeze(1) * n

    def rows(self, start: int, stop: int) -> Tensor:
        """(splits, stop - start) rows of the concatenation: positions of each split's own order."""
        return self.offset + torch.arange(start, stop)

    def repeat(self, rows: Tensor, times: int) -> Tensor:
        """The same rows for several members of each split: member m belongs to split m // times."""
        return rows.repeat_interleave(times, dim=0)


def network(features: int, hidden: int, outputs: int = 1, p: float | None = None) -> nn.Sequential:
    drop = [nn.Dropout(p)] if p is not None else []
    layers = [*drop, nn.Linear(features, hidden), nn.ReLU(), *drop, nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers)


def draws_of(ensemble: vbdl.DeepEnsemble, member: int, base, likelihood, x: Tensor, n_samples: int) -> Tensor:
    """(samples, rows, 1, 2) parameters of p(y | x) of one member alone, in standardised units."""
    base.module.load_state_dict(ensemble.member(member), strict=False)
    return vbdl.Predictor(base, likelihood, n_samples, compile=False, tiles=(256,))(x, samples=True).samples


def scores(mean: Tensor, log_variance: Tensor, y: Tensor, scale: float) -> tuple[float, float]:
    """RMSE and mean log-likelihood in target units of an equal mixture; mean, log_variance: (samples, rows)."""
    rmse = (mean.mean(0) - y).square().mean().sqrt() * scale
    each = -0.5 * (math.log(2 * math.pi) + log_variance + (mean - y).square() * (-log_variance).exp())
    ll = torch.logsumexp(each, 0) - math.log(len(mean)) - math.log(scale)
    return float(rmse), float(ll.mean())


def run_dropout(data: Splits, budget: float, samples: int) -> list[tuple[float, float]]:
    hidden, features = int(data.settings["n_hidden"]), data.x.shape[1]
    epochs = max(1, round(int(data.settings["n_epochs"]) * 100 * budget))
    rates = [float(p) for p in data.settings["dropout_grid"]]
    taus = [float(t) for t in data.settings["tau_grid"]]
    cut = int(data.n_train * 0.8)

    def train(p: float, n: int, epochs: int, splits: list[int]) -> vbdl.DeepEnsemble:
        decay = 1e-4 * (1 - p) / (2 * n * sorted(taus)[len(taus) // 2])
        q = vbdl.DeepEnsemble(vbdl.MCDropout(network(features, hidden, p=p)), len(splits))
        vbdl.fit(
            q,
            (data.x, data.y),
            vbdl.Gaussian(std=1.0, learned=False),  # half the squared error
            epochs=epochs,
            batch_size=128,
            optimizer=lambda ps: torch.optim.Adam(ps, lr=1e-3, weight_decay=decay, fused=True),
            member_rows=data.rows(0, n)[splits],
        )
        return q

    def evaluate(split: int, rows: Tensor, tau: float, mean: Tensor) -> tuple[float, float]:
        variance = torch.full_like(mean, -math.log(tau * data.scale[split] ** 2))  # tau is in target units
        return scores(mean, variance, data.y[rows].squeeze(1), data.scale[split])

    def means(q: vbdl.DeepEnsemble, member: int, p: float, rows: Tensor) -> Tensor:
        base = vbdl.MCDropout(network(features, hidden, p=p))
        fixed = vbdl.Gaussian(std=1.0, learned=False)
        return draws_of(q, member, base, fixed, data.x[rows], samples)[..., 0, 0]

    best: list[tuple[float, float, float]] = [(-math.inf, 0.0, 0.0)] * data.count
    held = data.rows(cut, data.n_train)
    for p in rates:
        q = train(p, cut, max(1, epochs // 4), list(range(data.count)))
        for split in range(data.count):
            mean = means(q, split, p, held[split])
            for tau in taus:
                _, ll = evaluate(split, held[split], tau, mean)
                best[split] = max(best[split], (ll, p, tau))
    results: list[tuple[float, float]] = [(0.0, 0.0)] * data.count
    test = data.rows(data.n_train, data.n_train + data.n_test)
    for p in sorted({b[1] for b in best}):
        chosen = [split for split, b in enumerate(best) if b[1] == p]
        q = train(p, data.n_train, epochs, chosen)
        for member, split in enumerate(chosen):
            results[split] = evaluate(split, test[split], best[split][2], means(q, member, p, test[split]))
    return results


def run_ensemble(data: Splits, budget: float, samples: int) -> list[tuple[float, float]]:
    del samples
    members = 5
    q = vbdl.DeepEnsemble(network(data.x.shape[1], 50, outputs=2), data.count * members)
    likelihood = vbdl.HeteroscedasticGaussian()
    vbdl.fit(
        q,
        (data.x, data.y),
        likelihood,
        epochs=max(1, round(40 * budget)),
        batch_size=100,
        lr=0.01,
        member_rows=data.repeat(data.rows(0, data.n_train), members),
    )
    results = []
    test = data.rows(data.n_train, data.n_train + data.n_test)
    stacked = q.stacked()
    for split in range(data.count):
        own = [network(data.x.shape[1], 50, outputs=2) for _ in range(members)]
        for m, one in enumerate(own):
            one.load_state_dict({n: t[split * members + m] for n, t in stacked.items()})
        predict = vbdl.Predictor(vbdl.DeepEnsemble(own), likelihood, compile=False, tiles=(256,))
        found = predict(data.x[test[split]], samples=True).samples[:, :, 0]
        results.append(scores(found[..., 0], found[..., 1], data.y[test[split]].squeeze(1), data.scale[split]))
    return results


def run_mean_field(data: Splits, budget: float, samples: int) -> list[tuple[float, float]]:
    features = data.x.shape[1]
    make = lambda: vbdl.MeanField(network(features, 50), n_data=data.n_train, prior_std=1.0, initial_std=0.02)
    q, likelihood = vbdl.DeepEnsemble(make(), data.count), vbdl.Gaussian(std=0.5)
    epochs = max(1, round(500 * budget))
    vbdl.fit(
        q,
        (data.x, data.y),
        likelihood,
        epochs=epochs,
        batch_size=128,
        lr=5e-3,
        schedule="cosine",
        kl_warmup=epochs // 4,
        member_rows=data.rows(0, data.n_train),
    )
    results = []
    test = data.rows(data.n_train, data.n_train + data.n_test)
    for split in range(data.count):
        own = vbdl.Gaussian(std=float(likelihood.noise_std[split]), learned=False)
        found = draws_of(q, split, make(), own, data.x[test[split]], min(samples, 1000))[:, :, 0]
        results.append(scores(found[..., 0], found[..., 1], data.y[test[split]].squeeze(1), data.scale[split]))
    return results


RUN = {"dropout": run_dropout, "ensemble": run_ensemble, "mean-field": run_mean_field}


def published(method: str, name: str, data: Splits) -> tuple[float, float] | None:
    """Mean log-likelihood of the published column and its standard error."""
    if method == "dropout":
        found = np.asarray(data.settings["gal2018_test_ll"])
        return float(found.mean()), float(found.std() / math.sqrt(len(found)))
    if method in PUBLISHED:
        mean, std = PUBLISHED[method][name]
        return mean, std / math.sqrt(data.count)
    return None


def verdict(ll: np.ndarray, column: tuple[float, float] | None) -> str:
    if column is None:
        return "-"
    error = math.hypot(ll.std(ddof=1) / math.sqrt(len(ll)), column[1])
    z = (ll.mean() - column[0]) / error
    return f"{'better' if z > 2 else 'within two SE' if z >= -2 else 'WORSE'} ({z:+.1f} SE)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("VBDL_DATA"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--budget", type=float, default=1.0, help="share of the epochs, for a quick look")
    parser.add_argument("--samples", type=int, default=2000, help="draws in evaluation")
    parser.add_argument("--out", type=Path, help="append a JSON line a result")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and run nothing")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(text) for text in options.table.read_text().splitlines()]))
        return 0
    if options.data is None:
        print("give --data FOLDER or set VBDL_DATA: the folder that holds uci_regression/*.npz", file=sys.stderr)
        return 2
    folder = Path(options.data) / "uci_regression"
    baseline = json.loads((folder / "linear_baseline_computed_here.json").read_text())
    rows = []
    for name in options.sets:
        data = Splits(folder / f"{name}.npz")
        for method in options.methods:
            begun = time.perf_counter()
            results = np.array(RUN[method](data, options.budget, options.samples))
            seconds = time.perf_counter() - begun
            linear = baseline["rows"][name]
            column = published(method, name, data)
            rmse, ll = results.T
            row = {
                "set": name,
                "method": method,
                "splits": len(results),
                "rmse": rmse.mean(),
                "rmse_se": rmse.std(ddof=1) / math.sqrt(len(rmse)),
                "ll": ll.mean(),
                "ll_se": ll.std(ddof=1) / math.sqrt(len(ll)),
                "published_ll": column[0] if column else None,
                "published_ll_se": column[1] if column else None,
                "against_published": verdict(ll, column),
                "linear_rmse": linear["rmse"][0],
                "linear_ll": linear["ll"][0],
                "seconds": seconds,
                "budget": options.budget,
                "ll_per_split": ll.tolist(),
                "rmse_per_split": rmse.tolist(),
                "machine": {
                    "processor": platform.processor() or platform.machine(),
                    "threads": torch.get_num_threads(),
                },
                "versions": {"torch": torch.__version__, "vbdl": vbdl.__version__, "python": platform.python_version()},
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            rows.append(row)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
    return 0


def table(rows: list[dict]) -> str:
    """Markdown, a row a result: means over the splits and their standard errors."""
    names = ("set", "method", "RMSE", "linear", "log-likelihood", "linear", "published", "against it", "seconds")
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for row in sorted(rows, key=lambda r: (r["set"], METHODS.index(r["method"]))):
        column = "-" if row["published_ll"] is None else f"{row['published_ll']:.2f} ± {row['published_ll_se']:.2f}"
        lines.append(
            f"| {row['set']} | {row['method']} | {row['rmse']:.3f} ± {row['rmse_se']:.3f} | {row['linear_rmse']:.2f} "
            f"| {row['ll']:.3f} ± {row['ll_se']:.3f} | {row['linear_ll']:.2f} | {column} "
            f"| {row['against_published']} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def line(row: dict) -> str:
    column = (
        "" if row["published_ll"] is None else f" published {row['published_ll']:6.2f} ± {row['published_ll_se']:.2f}"
    )
    return (
        f"{row['set']:9}{row['method']:11} rmse {row['rmse']:7.3f} ± {row['rmse_se']:.3f}   "
        f"ll {row['ll']:7.3f} ± {row['ll_se']:.3f}  {column}  {row['against_published']}  {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
