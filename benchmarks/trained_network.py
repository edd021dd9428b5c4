"""SWAG and snapshots from a trained network against torch-uncertainty and lightning-uq-box. CPU, one thread.

    pip install torch-uncertainty==0.13.0 lightning-uq-box==0.2.0
    python benchmarks/trained_network.py [--seeds 5] [--seconds 20] [--out benchmarks/results/trained-network-cpu.jsonl]
    python benchmarks/trained_network.py --table     prints the results of the file as Markdown tables, runs nothing

Data: the digits of scikit-learn, 1,797 images of 8 x 8 pixels, 60 % to train on, the others to test. Network:
64-128-128-10, trained by SGD for 20 epochs, the same start for all contenders of a seed.

SWAG: 30 epochs more, SGD, learning rate 0.05, batches of 64, weights collected once an epoch, rank 20, 30 draws.
Snapshots: 5 cycles of 6 epochs from an untrained network, learning rate 0.1 along half a cosine, step by step.

torch-uncertainty's `SWAG` and `CheckpointCollector` and lightning-uq-box's `SWAGClassification` are called from a plain
loop of SGD as a user of torch would write it, with one `DataLoader` of tensors, without the trainer of either library,
which would only make them slower. torch-uncertainty draws anew after every collected epoch: `update_wrapper` does. Its
draws take other normals of the low-rank part for each parameter than for the next, where the paper's are shared, and
lightning-uq-box counts the weights before the first collected ones in the mean without dividing by their number. That
is the likely reason for differences of the NLL here, where the network still improves while weights are collected; it
was not tested.

Quality: test NLL, accuracy and ECE, means and standard errors over the seeds, and the NLL minus that of vbdl, paired.
Times: medians of contenders in turn; training is that of the SWAG or snapshot phase as a whole.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

import speed
from networks import commit

import vbdl
from vbdl import metrics

RESULTS = Path(__file__).parent / "results" / "trained-network-cpu.jsonl"
BATCH, START, EPOCHS, RATE, RANK, DRAWS = 64, 20, 30, 0.05, 20, 30
CYCLES, CYCLE, CYCLE_RATE = 5, 6, 0.1

Predict = Callable[[Tensor], Tensor]  # rows -> (draws, rows, classes) logits, or (rows, classes) probabilities


def rows(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y, n = x[order], y[order], round(0.6 * len(y))
    return (x[:n], y[:n]), (x[n:], y[n:])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )  # fmt: skip


def sgd(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    rate: Callable[[float], float],
    seed: int,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> None:
    """The plain loop; rate: the learning rate as a function of the epochs done."""
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(*data), BATCH, shuffle=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate(0.0))
    net.train()
    for epoch in range(epochs):
        for step, (x, y) in enumerate(loader):
            optimizer.param_groups[0]["lr"] = rate(epoch + step / len(loader))
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        after_epoch(epoch)
    net.eval()


def cosine(done: float) -> float:
    return CYCLE_RATE / 2 * (1 + math.cos(math.pi * (done % CYCLE) / CYCLE))


def of_vbdl(
    q: vbdl.types.Posterior, data: tuple[Tensor, Tensor], epochs: int, rate: float, seed: int
) -> vbdl.Predictor:
    likelihood = vbdl.Categorical()
    vbdl.fit(
        q, data, likelihood, epochs=epochs, batch_size=BATCH, seed=seed, progress=False,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=rate),
    )  # fmt: skip
    return vbdl.Predictor(q, likelihood, DRAWS if q.n_draws is None else None)


def vbdl_swag(net: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> vbdl.Predictor:
    return of_vbdl(vbdl.SWAG(net, RANK), data, EPOCHS, RATE, seed)


def vbdl_snapshots(net: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> vbdl.Predictor:
    return of_vbdl(vbdl.Snapshots(net, CYCLES), data, CYCLES * CYCLE, CYCLE_RATE, seed)


def uncertainty_swag(net: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> Predict:
    from torch_uncertainty.methods import SWAG

    # a scale of 0.5 halves the covariance, as in the paper; epochs are counted from 1, since the first is left out
    model = SWAG(copy.deepcopy(net), 0, 1, scale=0.5, max_num_models=RANK, num_estimators=DRAWS)
    sgd(model.core_model, data, EPOCHS, lambda done: RATE, seed, lambda epoch: model.update_wrapper(epoch + 1))
    model.eval()
    return lambda x: model(x).view(DRAWS, len(x), -1)


def uncertainty_snapshots(net: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> Predict:
    from torch_uncertainty.methods import CheckpointCollector

    ends = [CYCLE * cycle - 1 for cycle in range(1, CYCLES)]  # the last is the final model
    model = CheckpointCollector(copy.deepcopy(net), save_schedule=ends)
    sgd(model.core_model, data, CYCLES * CYCLE, cosine, seed, model.update_wrapper)
    model.eval()
    for saved in model.saved_models:
        saved.eval()
    return lambda x: model(x).view(CYCLES, len(x), -1)


def lightning_swag(net: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> Predict:
    from lightning_uq_box.uq_methods import SWAGClassification

    model = SWAGClassification(copy.deepcopy(net), RANK, 1, DRAWS, RATE, nn.CrossEntropyLoss())
    sgd(model.model, data, EPOCHS, lambda done: RATE, seed, lambda epoch: model.update_uncertainty_buffers())
    return lambda x: model.sample_predictions(x).movedim(-1, 0)


CONTENDERS: dict[str, dict[str, Callable[[nn.Module, tuple[Tensor, Tensor], int], Any]]] = {
    "SWAG": {"vbdl": vbdl_swag, "torch-uncertainty": uncertainty_swag, "lightning-uq-box": lightning_swag},
    "snapshots": {"vbdl": vbdl_snapshots, "torch-uncertainty": uncertainty_snapshots},
}


def start_of(method: str, seed: int, data: tuple[Tensor, Tensor]) -> nn.Module:
    net = network(seed)
    if method == "SWAG":
        sgd(net, data, START, lambda done: 0.1, seed)
    return net


def probabilities(predict: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict(x).probs if isinstance(predict, vbdl.Predictor) else predict(x).softmax(-1).mean(0)


def scores(probs: Tensor, y: Tensor) -> dict[str, float]:
    nll = float(-probs.double().gather(1, y[:, None]).clamp_min(1e-30).log().mean())
    return {
        "nll": nll,
        "accuracy": float((probs.argmax(1) == y).double().mean()),
        "ece": float(metrics.ece(probs, y)),
    }


def quality(method: str, seeds: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ["start", *CONTENDERS[method]]}
    for seed in range(seeds):
        data, (x, y) = rows(seed)
        net = start_of(method, seed, data)
        if method == "SWAG":
            found["start"].append(scores(net(x).softmax(-1).detach(), y))
        for name, train in CONTENDERS[method].items():
            found[name].append(scores(probabilities(train(net, data, seed), x), y))
    lines = []
    for name, each in found.items():
        if not each:
            continue
        line: dict[str, Any] = {"kind": "quality", "method": method, "contender": name, "seeds": seeds}
        for score in each[0]:
            line |= {score: mean([e[score] for e in each]), f"{score}_se": error([e[score] for e in each])}
        apart = [e["nll"] - own["nll"] for e, own in zip(each, found["vbdl"], strict=True)]
        lines.append(line | {"nll_more": mean(apart), "nll_more_se": error(apart)})
    return lines


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def times(method: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    data, (x, _) = rows(0)
    net = start_of(method, 0, data)
    runs = {n: (lambda train=train: train(net, data, 0)) for n, train in CONTENDERS[method].items()}
    cells = {"training": runs}
    trained = {name: run() for name, run in runs.items()}
    for count in (1, 64):
        some = x[:count]
        trained["vbdl"].warm_up((count,), example=some)
        cells[f"{count} rows"] = {n: (lambda p=p, some=some: probabilities(p, some)) for n, p in trained.items()}
    lines = []
    for cell, contenders in cells.items():
        for name, t in speed.interleave(contenders, seconds, rounds).items():
            line = {"kind": "time", "method": method, "cell": cell, "contender": name}
            lines.append(line | {"wall_ms": 1e3 * t.wall, "cpu_ms": 1e3 * t.cpu, "ratio": 1 / t.ratio})
    return lines


def report(results: list[dict[str, Any]]) -> str:
    """Markdown tables; the last of equal rows counts."""
    quality = {(r["method"], r["contender"]): r for r in results if r["kind"] == "quality"}
    lines = ["| method | contender | NLL | accuracy | ECE | NLL minus vbdl's |", "| --- " * 6 + "|"]
    for (method, name), r in quality.items():
        both = lambda key, r=r: f"{r[key]:.4f} ± {r[key + '_se']:.4f}"
        more = "-" if name == "vbdl" else f"{r['nll_more']:+.4f} ± {r['nll_more_se']:.4f}"
        lines.append(f"| {method} | {name} | {both('nll')} | {both('accuracy')} | {both('ece')} | {more} |")
    lines += ["", "| method | cell | contender | ms | of vbdl's |", "| --- " * 5 + "|"]
    for (method, cell, name), r in {
        (r["method"], r["cell"], r["contender"]): r for r in results if r["kind"] == "time"
    }.items():
        lines.append(f"| {method} | {cell} | {name} | {r['wall_ms']:.3g} | {r['ratio']:.3g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing a cell")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="append a JSON line a result")
    parser.add_argument("--table", action="store_true", help="print the tables of --out, run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.table:
        print(report([json.loads(line) for line in options.out.read_text().splitlines()]))
        return
    about, results = {"commit": commit(), "machine": speed.machine()}, []
    for method in CONTENDERS:
        for row in [*quality(method, options.seeds), *times(method, options.seconds, options.rounds)]:
            results.append(row)
            print(row, flush=True)
            rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
            with options.out.open("a") as file:
                file.write(json.dumps(rounded | about) + "\n")
    print("\n" + report(results))


if __name__ == "__main__":
    main()
