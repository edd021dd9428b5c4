"""Evaluate decisions on real data: referral under shift, hand-over, credit with costs, value at risk.

    python benchmarks/decisions.py [referral handover credit var] --data ../shared/data

Each part trains its own small models (minutes on a CPU core), prints a table and one JSON line.
"""

import argparse
import csv
import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vbdl import decision, metrics
from vbdl.calibration import Temperature, calibrate
from vbdl.data.fingerprint import fingerprints
from vbdl.data.splitting import split
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.heteroscedastic import HeteroscedasticGaussian
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.training.fit import fit


def _convolutional(channels: int, classes: int, side: int, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, classes),
    )


def referral(data: Path) -> dict:
    """Evaluate referral on PneumoniaMNIST, whose test set is shifted (62 % pneumonia instead of 74 %)."""
    arrays = np.load(data / "pneumoniamnist" / "pneumoniamnist.npz")
    x, y = {}, {}
    for part in ("train", "val", "test"):
        x[part] = torch.from_numpy(arrays[f"x_{part}"]).float().unsqueeze(1) / 127.5 - 1
        y[part] = torch.from_numpy(arrays[f"y_{part}"].astype(np.int64)).reshape(-1)
    # duplicates between train and validation exist in this data set, and calibrate would refuse them
    clean = ~torch.isin(fingerprints(x["val"]), fingerprints(x["train"]))
    x["val"], y["val"] = x["val"][clean], y["val"][clean]
    print(f"\nPneumoniaMNIST, {int((~clean).sum())} validation rows that are also training rows left out")
    columns = (
        f"{'accuracy':>9s} {'NLL':>7s} {'ECE %':>6s} {'AUROC':>6s} {'err all':>8s} {'err 80 %':>9s} {'err 50 %':>9s}"
    )
    print(f"{'method':12s} {'set':5s} {columns} {'AURC':>7s}")
    results = {}
    torch.manual_seed(0)
    for name, posterior, epochs in (
        ("ensemble 5", DeepEnsemble(_convolutional(1, 2, 28), n_members=5), 6),
        ("MC dropout", MCDropout(_convolutional(1, 2, 28, 0.3)), 12),
    ):
        likelihood = Categorical()
        fit(
            posterior, (x["train"], y["train"]), likelihood, epochs=epochs, batch_size=64, progress=False, compile=False
        )
        predictor = Predictor(posterior, likelihood, compile=False)
        predictor = calibrate(predictor, (x["val"], y["val"]), Temperature())
        rows = {}
        for part in ("val", "test"):
            p = predictor(x[part])
            wrong = (p.label != y[part]).double()
            u = p.total
            errors = {c: metrics.risk_at_coverage(u, wrong, c) for c in (1.0, 0.8, 0.5)}
            rows[part] = {
                "accuracy": metrics.accuracy(p.probs, y[part]),
                "nll": float(metrics.categorical_nll(p.probs, y[part]).mean()),
                "ece": metrics.ece(p.probs, y[part]),
                "auroc": metrics.auroc(p.probs[:, 1], y[part]),
                "error": errors,
                "aurc": metrics.aurc(u, wrong),
            }
            r = rows[part]
            print(
                f"{name:12s} {part:5s} {r['accuracy']:9.4f} {r['nll']:7.4f} {100 * r['ece']:6.2f} {r['auroc']:6.4f} "
                f"{errors[1.0]:8.4f} {errors[0.8]:9.4f} {errors[0.5]:9.4f} {r['aurc']:7.4f}"
            )
        # is the kept half better than all by more than chance? rows resampled together
        p = predictor(x["test"])
        wrong = (p.label != y["test"]).double()
        gain = metrics.bootstrap(
            lambda u, w: w.mean() - metrics.risk_at_coverage(u, w, 0.5), p.total, wrong, n_resamples=500
        )
        print(f"{name:12s} test  error of all minus error of the kept half: {gain}")
        # a guarantee bought on validation rows: kept there, and looked at under shift
        rule = decision.Referral("total").for_risk(
            predictor(x["val"]), predictor(x["val"]).label != y["val"], risk=0.02, delta=0.1, method="ltt"
        )
        rows["gain_of_half"] = [gain.value, gain.lower, gain.upper]
        certificate = rule.certificate
        assert certificate is not None
        print(f"{name:12s} promise on val: error <= 2 % of the kept {certificate.coverage:.1%}, delta 0.1")
        if certificate.n_kept:
            observed = rule.check(p, wrong)
            kept = float((~rule.refer(p)).double().mean())
            verdict = "BROKEN by the shift" if observed.lower > 0.02 else "not contradicted"
            print(f"{name:12s} on test: keeps {kept:.1%}, error {observed}: the promise is {verdict}")
            rows["promise"] = {
                "coverage_val": certificate.coverage,
                "coverage_test": kept,
                "risk_test": [observed.value, observed.lower, observed.upper],
            }
        results[name] = rows
    return {"referral": results}


def handover(data: Path) -> dict:
    """Evaluate hand-over on a GTSRB subset split by track, with eight sign classes absent from training."""
    arrays = np.load(data / "gtsrb_small" / "gtsrb_small.npz")
    to_tensor = lambda a: torch.from_numpy(a).float().permute(0, 3, 1, 2).contiguous() / 127.5 - 1
    unknown = torch.tensor([0, 6, 14, 17, 22, 27, 33, 40])
    y_all = torch.from_numpy(arrays["y_train"].astype(np.int64))
    known = ~torch.isin(y_all, unknown)
    kept_classes = torch.tensor([k for k in range(43) if k not in unknown.tolist()])
    number = torch.full((43,), -1)
    number[kept_classes] = torch.arange(35)
    x_all, tracks = to_tensor(arrays["x_train"])[known], torch.from_numpy(arrays["track_train"].astype(np.int64))[known]
    y_all = number[y_all[known]]
    parts = split(len(y_all), {"train": 0.85, "calibration": 0.15}, groups=tracks)
    shared = set(tracks[parts["train"]].tolist()) & set(tracks[parts["calibration"]].tolist())
    assert not shared
    torch.manual_seed(0)
    posterior, likelihood = DeepEnsemble(_convolutional(3, 35, 32), n_members=5), Categorical()
    train = parts["train"]
    fit(posterior, (x_all[train], y_all[train]), likelihood, epochs=12, batch_size=64, progress=False, compile=False)
    predictor = Predictor(posterior, likelihood, compile=False)
    held = parts["calibration"]
    predictor = calibrate(predictor, (x_all[held], y_all[held]), Temperature())
    x_test, y_test = to_tensor(arrays["x_test"]), torch.from_numpy(arrays["y_test"].astype(np.int64))
    p = predictor(x_test)
    strange = torch.isin(y_test, unknown)
    accuracy = metrics.accuracy_interval(p.probs[~strange], number[y_test[~strange]])
    print(f"\nGTSRB, 35 known classes: accuracy {accuracy}")
    print(f"{int(strange.sum())} of {len(y_test)} test rows are signs of classes never seen in training")
    result: dict = {"accuracy": accuracy.value}
    print(f"{'score':12s} {'AUROC (95 %)':>26s} {'AUPR':>7s} {'FPR95':>7s}")
    for kind in ("total", "aleatoric", "epistemic", "confidence"):
        u = decision.uncertainty_of(p, kind)
        area = metrics.auroc_interval(u, strange)
        print(f"{kind:12s} {str(area):>26s} {metrics.aupr(u, strange):7.4f} {metrics.fpr_at_tpr(u, strange):7.4f}")
        result[kind] = [area.value, area.lower, area.upper]
    # a drive: known signs, then a stretch of unknown ones, then known again. The risk of a frame is the mean epistemic
    # uncertainty of the last ten; thresholds are quantiles of the same on drives through calibration rows
    generator = torch.Generator().manual_seed(0)
    recent = lambda u: nn.functional.avg_pool1d(nn.functional.pad(u[None], (9, 0), value=0.0), 10, 1)[0]
    u_held = predictor(x_all[held]).epistemic
    quiet = recent(u_held[torch.randint(len(u_held), (20_000,), generator=generator)]).double()
    warn, hand = ((float(quiet.quantile(a)), float(quiet.quantile(b))) for a, b in ((0.95, 0.7), (0.995, 0.8)))
    pick = lambda rows, n: rows.nonzero().squeeze(1)[torch.randint(int(rows.sum()), (n,), generator=generator)]
    modes = {}
    for name, order in (
        ("known only", pick(~strange, 900)),
        ("with unknown", torch.cat((pick(~strange, 300), pick(strange, 300), pick(~strange, 300)))),
    ):
        machine = decision.HandOver(warn, hand, dwell=5, deadline=0.05, latched=False)
        seen = machine.run(recent(p.epistemic[order]), torch.full((len(order),), 0.01))
        wrong = torch.where(strange[order], True, p.label[order] != number[y_test[order]])
        driving = seen == decision.Mode.DRIVE
        share = [float((seen == m).double().mean()) for m in decision.Mode]
        error = float(wrong[driving].double().mean()) if bool(driving.any()) else math.nan
        print(
            f"{name:12s} drive {share[0]:.2f}, warn {share[1]:.2f}, hand over {share[2]:.2f}; wrong while driving "
            f"{error:.3f}, wrong over all frames {float(wrong.double().mean()):.3f}"
        )
        modes[name] = {"share": share, "error_driving": error, "error_all": float(wrong.double().mean())}
        if name == "with unknown":
            inside = float((seen[300:600] != decision.Mode.DRIVE).double().mean())
            print(f"{'':12s} not driving in {inside:.1%} of the frames with unknown signs")
            modes["caught"] = inside
    return {"handover": {**result, "drive": modes}}


def _german(data: Path) -> tuple[Tensor, Tensor]:
    with gzip.open(data / "finance" / "german_credit.csv.gz", "rt") as file:
        header, *rows = list(csv.reader(file))
    y = torch.tensor([int(float(r[-1])) for r in rows])
    bad = y if set(y.tolist()) == {0, 1} else (y == 2).long()
    columns = []
    for values in list(zip(*rows, strict=True))[:-1]:
        try:
            columns.append(np.array(values, dtype=np.float64)[:, None])
        except ValueError:
            levels = sorted(set(values))
            columns.append((np.array(values)[:, None] == np.array(levels)).astype(np.float64))
    return torch.from_numpy(np.concatenate(columns, axis=1)).float(), bad


def credit(data: Path) -> dict:
    """Evaluate German credit: accepting a bad applicant costs 5, declining a good one 1, a review 0.4."""
    raw, bad = _german(data)
    cost, refer_cost = torch.tensor([[0.0, 1.0], [5.0, 0.0]]), 0.4  # rows good, bad; actions accept, decline
    plain, referred, base, shares = [], [], [], []
    for seed in range(5):
        parts = split(len(bad), {"train": 0.6, "calibration": 0.2, "test": 0.2}, stratify=bad, seed=seed)
        torch.manual_seed(seed)
        train = raw[parts["train"]]
        # a level that no training row has is constant there: its std is 0
        x = (raw - train.mean(0)) / train.std(0).clamp(min=1e-3)
        network = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, 2))
        posterior, likelihood = DeepEnsemble(network, n_members=5), Categorical()
        rows = parts["train"]
        fit(posterior, (x[rows], bad[rows]), likelihood, epochs=30, weight_decay=1e-2, progress=False, compile=False)
        predictor = Predictor(posterior, likelihood, compile=False)
        held, test = parts["calibration"], parts["test"]
        predictor = calibrate(predictor, (x[held], bad[held]), Temperature(), allow_overlap=False)
        for into, rule in (
            (plain, decision.ExpectedCost(cost)),
            (referred, decision.ExpectedCost(cost, refer_cost)),
        ):
            p = decision.with_decision(predictor, rule)(x[test])
            into.append(decision.realized_cost(p.action, bad[test], cost, refer_cost))
            if into is referred:
                shares.append(float((p.action == decision.REFER).double().mean()))
        base.append(decision.realized_cost(torch.ones_like(test), bad[test], cost))
    a, b, c = torch.cat(plain), torch.cat(referred), torch.cat(base)
    difference = metrics.compare(b, a)
    print(f"\nGerman credit, cost per applicant over 5 splits ({a.numel()} decisions)")
    for name, values in (("decline everyone", c), ("accept or decline", a), ("with referral", b)):
        print(f"{name:18s} {metrics.mean_estimate(values).interval()}")
    print(
        f"referred {np.mean(shares):.1%}; difference {difference.difference:.4f} "
        f"[{difference.lower:.4f}, {difference.upper:.4f}], p = {difference.p_value:.1e}"
    )
    return {
        "credit": {
            "without": float(a.mean()),
            "with": float(b.mean()),
            "decline": float(c.mean()),
            "p": difference.p_value,
            "referred": float(np.mean(shares)),
        }
    }


SERIES = {
    "AUD/USD": ("fx_daily_1971_2017.csv.gz", "Australia", "2007-07-01", "2010-07-01"),
    "GBP/USD": ("fx_daily_1971_2017.csv.gz", "United Kingdom", "2007-07-01", "2010-07-01"),
    "Brent": ("oil_brent_daily.csv.gz", "price", "2019-01-01", "2021-07-01"),
}
WINDOW, EVERY, MEMBERS = 125, 21, 20  # days trained on, days between trainings, networks


def _returns(path: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The dates and the daily log returns in per cent."""
    with gzip.open(path, "rt") as file:
        header, *rows = list(csv.reader(file))
    kept = [(r[0], float(r[header.index(column)])) for r in rows if r[header.index(column)].strip()]
    return np.array([d for d, _ in kept])[1:], 100 * np.diff(np.log([v for _, v in kept]))


def value_at_risk(data: Path) -> dict:
    """Evaluate one-day VaR through 2008 and 2020, from networks retrained monthly on half a year.

    So few rows leave the parameters uncertain, which is where it could matter whether a VaR knows of it.
    """
    results: dict = {}
    print(f"\nOne-day VaR; {MEMBERS} networks on bootstraps of the last {WINDOW} days, again every {EVERY} days")
    print(
        f"{'series':8s} {'level':5s} {'predictive':30s} {'days':>5s} {'beyond':>7s} {'expected':>9s} {'Kupiec':>8s} "
        f"{'Christoff.':>10s} {'VaR':>7s} {'score':>7s}"
    )
    for name, (file, column, begin, end) in SERIES.items():
        dates, r = _returns(data / "finance" / file, column)
        past = np.stack([r[i : len(r) - 20 + i] for i in range(20)], axis=1)
        recent = [np.log(np.abs(past[:, -days:]).mean(1) + 0.05) for days in (20, 5)]
        x, y, when = np.stack([*recent, past[:, -1]], axis=1), r[20:], dates[20:]
        (rows,) = ((when >= begin) & (when < end)).nonzero()
        parts = [_month(x, y, start, min(start + EVERY, rows[-1] + 1)) for start in range(rows[0], rows[-1] + 1, EVERY)]
        mean, std, constant = (torch.cat(column, dim=-1) for column in zip(*parts, strict=True))
        actual = torch.from_numpy(y[rows])
        results[name] = {level: _backtests(name, level, mean, std, constant, actual) for level in (0.975, 0.99)}
    return {"var": results}


def _month(x: np.ndarray, y: np.ndarray, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """The means and stds of each network, (members, days), and of the window, (days,), for [start, stop)."""
    train = slice(start - WINDOW, start)
    scaled = (x[start - WINDOW : stop] - x[train].mean(0)) / x[train].std(0)
    inputs, unit = torch.from_numpy(scaled).float().clamp(-4, 4), float(y[train].std())
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    posterior, likelihood = DeepEnsemble(network, n_members=MEMBERS), HeteroscedasticGaussian()
    fit(
        posterior,
        (inputs[:WINDOW], torch.from_numpy(y[train] / unit).float()),
        likelihood,
        epochs=60,
        batch_size=WINDOW,
        lr=1e-2,
        weight_decay=1e-2,
        bootstrap=True,
        progress=False,
        compile=False,
    )
    kept = Predictor(posterior, likelihood, compile=False)(inputs[WINDOW:], samples=True).samples[:, :, 0].double()
    constant = torch.full((stop - start,), unit, dtype=torch.float64)
    return kept[..., 0] * unit, (0.5 * kept[..., 1]).exp() * unit, constant


def _backtests(name: str, level: float, mean: Tensor, std: Tensor, constant: Tensor, actual: Tensor) -> dict:
    tails = {
        "std of the window": decision.gaussian_tail(torch.zeros_like(actual), constant, level).var,
        "one network": decision.gaussian_tail(mean[0], std[0], level).var,
        "without parameter uncertainty": decision.gaussian_tail(mean.mean(0), (std**2).mean(0).sqrt(), level).var,
        "with parameter uncertainty": decision.mixture_tail(mean, std, level).var,
    }
    results, scores = {}, {}
    for label, var in tails.items():
        result = decision.backtest(actual < -var, level)
        # the quantile score: proper, in per cent of return, lower is better
        scores[label] = torch.where(actual < -var, level, level - 1).abs() * (actual + var).abs()
        results[label] = {
            "beyond": result.violations,
            "expected": result.expected,
            "kupiec": result.kupiec,
            "christoffersen": result.conditional,
            "mean_var": float(var.mean()),
            "quantile_score": float(scores[label].mean()),
        }
        print(
            f"{name:8s} {level:5.3f} {label:30s} {result.n:5d} {result.violations:7d} {result.expected:9.1f} "
            f"{result.kupiec:8.4f} {result.conditional:10.4f} {float(var.mean()):6.3f}% "
            f"{float(scores[label].mean()):7.4f}"
        )
    for other in ("one network", "without parameter uncertainty"):
        c = metrics.compare(scores["with parameter uncertainty"], scores[other])
        print(
            f"{'':14s} with, minus {other}: {c.difference:+.5f} [{c.lower:+.5f}, {c.upper:+.5f}], p = {c.p_value:.2g}"
        )
        results[f"with minus {other}"] = [c.difference, c.lower, c.upper, c.p_value]
    return results


PARTS = {"referral": referral, "handover": handover, "credit": credit, "var": value_at_risk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--data", default=os.environ.get("VBDL_DATA", "../shared/data"), type=Path)
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        raise SystemExit(f"{arguments.data} is not there: give --data or set VBDL_DATA")
    torch.set_num_threads(1)
    result = {}
    for part in arguments.parts or list(PARTS):
        result |= PARTS[part](arguments.data)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
