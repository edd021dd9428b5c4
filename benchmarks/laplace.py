"""The Laplace approximation against laplace-torch on the same network and rows. CPU, one thread.

    pip install laplace-torch==0.3
    python benchmarks/laplace.py [--cells ...] [--seconds 20] [--out benchmarks/results/laplace-cpu.jsonl]
    python benchmarks/laplace.py --table     prints the results of the file as a Markdown table, runs nothing

Network: images of 28 x 28 pixels, three convolutions (16, 32, 64 channels, the last two with stride 2) and a layer of
`features` units; the head is the last layer, on which both libraries put the posterior. Weights are random. Cells:

    fit                    curvature of 2,048 rows in batches of 128 and the prior precision: vbdl by the evidence,
                           laplace-torch with a given one (`fit`), and with its evidence (`optimize_prior_precision`)
    predict-probit         64 images without draws: estimator="moments" against link_approx="probit"
    predict-draws          64 images, 64 draws of the logits: Predictor by default against link_approx="mc"
    predict-weights        64 images, 64 draws of the weights: joint=True against pred_type="nn"
    memory                 resident memory that fitting and predicting add in a process of its own, 512 rows

with 10 classes and 128 features (Kronecker and full), 100 classes and 256 features (Kronecker), and memory of a head of
1,000 classes and 512 features (Kronecker; of laplace-torch only the fit, its predictions do not fit into memory).

Before timing, answers are compared: covariances of the logits on 4 images and the log evidence, relative; a cell whose
answers differ by more than 1e-3 is not timed. Both libraries treat the bias as independent of the weights here
(`joint_bias=False`), as laplace-torch always does. Times are medians of contenders in turn.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

import speed
from networks import commit

import vbdl

RESULTS = Path(__file__).parent / "results" / "laplace-cpu.jsonl"
ROWS, IMAGES, DRAWS, PRECISION = 2048, 64, 64, 1.0
HAS_PEER = bool(list(importlib.metadata.distributions(name="laplace-torch")))
HEADS = {"10": (10, 128), "100": (100, 256), "1000": (1000, 512)}
CELLS = [
    ("fit", "10", "kronecker"), ("fit", "10", "full"), ("fit", "100", "kronecker"),
    ("predict-probit", "10", "kronecker"), ("predict-draws", "10", "kronecker"), ("predict-weights", "10", "kronecker"),
    ("predict-probit", "10", "full"), ("predict-draws", "10", "full"),
    ("predict-probit", "100", "kronecker"), ("predict-draws", "100", "kronecker"),
    ("predict-weights", "100", "kronecker"), ("memory", "1000", "kronecker"),
]  # fmt: skip
PEERS = {"kronecker": "kron", "full": "full", "diagonal": "diag"}


def network(head: str) -> nn.Module:
    classes, features = HEADS[head]
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 7 * 7, features), nn.ReLU(),
        nn.Linear(features, classes),
    ).eval()  # fmt: skip


def rows(head: str, count: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 28, 28, generator=generator)
    return x, torch.randint(0, HEADS[head][0], (count,), generator=generator)


def ours(head: str, structure: str, data: tuple[Tensor, Tensor], **options: object) -> vbdl.Laplace:
    q = vbdl.Laplace(network(head), structure=structure, joint_bias=False, **options)
    vbdl.fit(q, data, vbdl.Categorical(), epochs=0, progress=False)
    return q


@functools.cache
def peer_class() -> Any:
    """The class Laplace of laplace-torch, a package with the name of this file, whose folder is searched first."""
    here, before = Path(__file__).resolve().parent, sys.path
    sys.path = [p for p in before if Path(p).resolve() != here]
    try:
        return importlib.import_module("laplace").Laplace
    finally:
        sys.path = before


def theirs(head: str, structure: str, data: tuple[Tensor, Tensor], optimize: bool = False) -> Any:
    peer = peer_class()(
        network(head), "classification", subset_of_weights="last_layer", hessian_structure=PEERS[structure],
        prior_precision=PRECISION,
    )  # fmt: skip
    peer.fit(DataLoader(TensorDataset(*data), 128))
    if optimize:
        peer.optimize_prior_precision(method="marglik", pred_type="glm")
    return peer


def fit_runs(head: str, structure: str) -> dict[str, Callable[[], object]]:
    data = rows(head)
    runs: dict[str, Callable[[], object]] = {"vbdl": lambda: ours(head, structure, data)}
    if HAS_PEER:
        runs["laplace-torch"] = lambda: theirs(head, structure, data)
        runs["laplace-torch, evidence"] = lambda: theirs(head, structure, data, optimize=True)
    return runs


def predict_runs(kind: str, head: str, structure: str) -> dict[str, Callable[[], object]]:
    data = rows(head)
    x = data[0][:IMAGES]
    q = ours(head, structure, data, prior_precision=PRECISION)
    how = {
        "predict-probit": {"estimator": "moments"},
        "predict-draws": {},
        "predict-weights": {"joint": True},
    }[kind]
    predict = vbdl.Predictor(q, vbdl.Categorical(), DRAWS, **how)
    predict.warm_up((IMAGES,), example=x)
    runs: dict[str, Callable[[], object]] = {"vbdl": lambda: predict(x)}
    if HAS_PEER:
        peer = theirs(head, structure, data)
        options = {
            "predict-probit": {"pred_type": "glm", "link_approx": "probit"},
            "predict-draws": {"pred_type": "glm", "link_approx": "mc", "n_samples": DRAWS},
            "predict-weights": {"pred_type": "nn", "link_approx": "mc", "n_samples": DRAWS},
        }[kind]
        runs["laplace-torch"] = lambda: peer(x, **options)
    return runs


def agreement(head: str, structure: str) -> float:
    """The largest relative difference of the two libraries' log evidence and variances of the logits."""
    data = rows(head, 512)
    q, peer = ours(head, structure, data, prior_precision=PRECISION), theirs(head, structure, data)
    evidence = float(peer.log_marginal_likelihood())
    _, variance = peer._glm_predictive_distribution(data[0][:4])
    exact = variance.diagonal(dim1=1, dim2=2)
    kept = vbdl.Predictor(q, vbdl.Categorical(), 4096, compile=False)(data[0][:4], samples=True).samples
    assert kept is not None
    # variances of 4,096 draws have a relative standard error of sqrt(2 / 4096) = 2 %, their mean over logits far less
    ratio = float((kept.var(0) / exact).mean())
    count = exact.numel()
    if abs(ratio - 1) > 5 * (2 / 4096 / count) ** 0.5:
        raise AssertionError(f"variances of the logits differ: {ratio:.4f} of laplace-torch's")
    return abs(q.log_evidence() / evidence - 1)


def memory(head: str, structure: str, contender: str) -> dict[str, float]:
    """The MB of resident memory that a fit of 512 rows, and then a prediction, add in this process."""
    peak = lambda: int(next(s.split()[1] for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s))
    data = rows(head, 512)
    net = network(head)
    net(data[0][:128])
    begun = peak()
    if contender == "vbdl":
        q = ours(head, structure, data)
        fitted = peak()
        vbdl.Predictor(q, vbdl.Categorical(), DRAWS, compile=False)(data[0][:IMAGES])
    else:
        theirs(head, structure, data)
        fitted = peak()
    return {"fit_mb": (fitted - begun) / 1024, "predict_mb": (peak() - begun) / 1024}


def run_memory(head: str, structure: str) -> list[dict[str, Any]]:
    found = []
    for contender in ["vbdl", *(["laplace-torch"] if HAS_PEER else [])]:
        command = [sys.executable, __file__, "--memory", json.dumps([head, structure, contender])]
        answer = subprocess.run(command, capture_output=True, text=True)
        last = (answer.stdout.strip() or answer.stderr.strip() or "nothing").splitlines()[-1]
        row = json.loads(last) if answer.returncode == 0 else {"failed": last}
        found.append({"contender": contender, **row})
    return found


def run_cell(kind: str, head: str, structure: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    if kind == "memory":
        return run_memory(head, structure)
    same = agreement(head, structure) if HAS_PEER else float("nan")
    if same > 1e-3:
        raise AssertionError(f"the log evidence differs from laplace-torch's by {same:.1e} of itself")
    runs = fit_runs(head, structure) if kind == "fit" else predict_runs(kind, head, structure)
    timings = speed.interleave(runs, options.seconds, options.rounds)
    return [
        {"contender": name, "wall_ms": 1e3 * t.wall, "cpu_ms": 1e3 * t.cpu, "ratio": 1 / t.ratio, "agreement": same}
        for name, t in timings.items()
    ]


def report(results: list[dict[str, Any]]) -> str:
    """A Markdown table of the cells; the last of equal rows counts."""
    last = {(r["cell"], r["classes"], r["structure"], r["contender"]): r for r in results}
    lines = ["| cell | classes | structure | contender | ms | of vbdl's | MB |", "| --- " * 7 + "|"]
    number = lambda r, key: f"{r[key]:.3g}" if key in r else "-"
    for (cell, classes, structure, name), r in last.items():
        if "failed" in r:
            lines.append(
                f"| {cell} | {classes} | {structure} | {name} | {' '.join(r['failed'].split())[:120]} | - | - |"
            )
            continue
        mb = f"fit {number(r, 'fit_mb')}, predict {number(r, 'predict_mb')}" if "fit_mb" in r else "-"
        lines.append(
            f"| {cell} | {classes} | {structure} | {name} | {number(r, 'wall_ms')} | {number(r, 'ratio')} | {mb} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="", help="of cell-classes-structure, those that contain one of these words")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing a cell")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="append a JSON line a result")
    parser.add_argument("--table", action="store_true", help="print the table of --out, run nothing")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.memory:
        print(json.dumps(memory(*json.loads(options.memory))))
        return
    if options.table:
        print(report([json.loads(line) for line in options.out.read_text().splitlines()]))
        return
    here, revision, results = speed.machine(), commit(), []
    if HAS_PEER:
        here["laplace-torch"] = importlib.metadata.version("laplace-torch")
    for cell in CELLS:
        kind, head, structure = cell
        if options.cells and not any(word in "-".join(cell) for word in options.cells.split(",")):
            continue
        with contextlib.suppress(KeyboardInterrupt):
            try:
                found = run_cell(kind, head, structure, options)
            except Exception as error:
                found = [{"contender": "vbdl", "failed": f"{type(error).__name__}: {error}"}]
            for row in found:
                row = {"cell": kind, "classes": HEADS[head][0], "structure": structure, **row}
                results.append(row)
                print(row, flush=True)
                rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
                with options.out.open("a") as file:
                    file.write(json.dumps(rounded | {"commit": revision, "machine": here}) + "\n")
    print("\n" + report(results))


if __name__ == "__main__":
    main()
