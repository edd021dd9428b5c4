"""BatchEnsemble and Masksembles against torch-uncertainty's layers, on the same numbers and rows. One CPU thread.

    pip install torch-uncertainty==0.13
    python benchmarks/shared_weights.py [--cells predict,train,quality] [--seconds 6] [--out FILE]
    python benchmarks/shared_weights.py --table     prints the results of the file as a Markdown table, runs nothing

Networks: `mlp`, 64 inputs, two hidden layers of 512 units, 10 classes, 8 members; `cnn`, 3 x 16 x 16 pixels,
convolutions of 32, 64 and 64 channels (stride 2 from the second on), global average and a linear layer, 4 members.
Masksembles: scale 2, all layers but the first masked. Cells:

    predict   1, 64 and 256 rows: probabilities, averaged over members, and the entropies of both kinds. vbdl: a
              warmed-up Predictor. torch-uncertainty: its layers on the batch repeated once for each member, softmax,
              mean and the same entropies, without gradients; also the whole compiled by torch.compile. loop: one plain
              network a member, its factors multiplied out.
    train     60 steps (cnn: 20) of Adam on 128 rows. torch-uncertainty: the usual loop on the batch repeated for each
              member (`repeat_training_inputs=True`). vbdl: `fit` with the same rows for all members (a DataLoader), its
              checks included, uncompiled and with compile=True, without the seconds of compiling.
    quality   digits of scikit-learn, 8 x 8 pixels, half of the rows held out, network `mlp` with layers of 128, 30
              epochs in batches of 64, Adam at 1e-3, five seeds: mean negative log-likelihood, accuracy and calibration
              error of the mixture, and seconds of training. Both start with factors of N(1, 0.5^2).

Before timing, the probabilities of all contenders are compared; a cell whose answers differ by more than 1e-5 is not
timed. Contenders run in turn in every round; times are medians, ratios are formed inside a round.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

import speed
from networks import commit

import vbdl

RESULTS = Path(__file__).parent / "results" / "shared-weights-cpu.jsonl"
HAS_PEER = importlib.util.find_spec("torch_uncertainty") is not None
MEMBERS, SCALE, CLASSES = {"mlp": 8, "cnn": 4}, 2.0, 10
ROWS, BATCH, STEPS = (1, 64, 256), 128, {"mlp": 60, "cnn": 20}
METHODS = ("batch-ensemble", "masksembles")


def network(name: str, width: int = 512) -> nn.Sequential:
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
        )
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, CLASSES),
    )  # fmt: skip


def rows(name: str, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (64,) if name == "mlp" else (3, 16, 16)
    return torch.randn(count, *shape, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def posterior(method: str, net: nn.Module, members: int, seed: int = 0) -> Any:
    if method == "batch-ensemble":
        return vbdl.BatchEnsemble(net, members, initial="normal", seed=seed)
    return vbdl.Masksembles(net, members, SCALE, seed=seed)


def peer(method: str, q: Any, net: nn.Sequential) -> nn.Sequential:
    """The network of torch-uncertainty's layers with the numbers of a posterior of vbdl."""
    from torch_uncertainty.layers import BatchConv2d, BatchLinear, MaskedConv2d, MaskedLinear

    entries, layers = {**q.shared(), **q.stacked()}, []
    for path, m in net.named_children():
        factor = entries.get(f"r.{path}/weight")
        if factor is None:
            layers.append(copy.deepcopy(m))
            continue
        if isinstance(m, nn.Linear):
            shape = {"in_features": m.in_features, "out_features": m.out_features}
            kinds = (BatchLinear, MaskedLinear)
        else:
            assert isinstance(m, nn.Conv2d)
            shape = {
                "in_channels": m.in_channels, "out_channels": m.out_channels, "kernel_size": m.kernel_size,
                "stride": m.stride, "padding": m.padding,
            }  # fmt: skip
            kinds = (BatchConv2d, MaskedConv2d)
        with torch.no_grad():
            if method == "batch-ensemble":
                layer: Any = kinds[0](num_estimators=q.n_members, **shape)
                layer.r_group.copy_(factor)
                layer.s_group.copy_(entries[f"s.{path}/weight"])
                layer.bias.copy_(entries[f"inner.{path}.bias"])
                product = layer.linear if isinstance(m, nn.Linear) else layer.conv
            else:
                layer = kinds[1](num_estimators=q.n_members, scale=SCALE, **shape)
                layer.mask.masks.data.copy_(factor)
                product = layer.linear if isinstance(m, nn.Linear) else layer.conv
                product.bias.copy_(entries[f"inner.{path}.bias"])
            product.weight.copy_(entries[f"inner.{path}.weight"])
        layers.append(layer)
    return nn.Sequential(*layers)


def summary(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean probabilities, the entropy of the mixture and the mean entropy; logits: (members, rows, classes)."""
    probs = logits.softmax(-1)
    entropy = lambda p: -torch.xlogy(p, p).sum(-1)
    mean = probs.mean(0)
    return mean, entropy(mean), entropy(probs).mean(0)


def repeated(model: nn.Module, members: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """torch-uncertainty's prediction: the batch repeated once for each member."""

    def predict(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return summary(model(x.repeat(members, *[1] * (x.ndim - 1))).view(members, len(x), CLASSES))

    return predict


def without_gradients(predict: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return torch.no_grad()(predict)


def predict_runs(method: str, name: str, count: int) -> dict[str, Callable[[], Any]]:
    members, net = MEMBERS[name], network(name)
    q, x = posterior(method, net, members), rows(name, count)[0]
    predict = vbdl.Predictor(q, vbdl.Categorical())  # tiles of 64 and more, if given, would promise equal bits of rows
    predict.warm_up((count,), example=x)
    networks = []
    for member in range(members):
        networks.append(copy.deepcopy(net).eval())
        networks[-1].load_state_dict(q.member(member))
    answers: dict[str, Callable[[Tensor], Any]] = {
        "vbdl": predict,
        "loop": without_gradients(lambda x: summary(torch.stack([one(x) for one in networks]))),
    }
    if HAS_PEER:
        model = peer(method, q, net).eval()
        answers["torch-uncertainty"] = without_gradients(repeated(model, members))
        answers["torch-uncertainty, compiled"] = without_gradients(torch.compile(repeated(model, members)))
    expected = answers["loop"](x)[0]
    for contender, answer in answers.items():
        given = answer(x)
        probs = given.probs if contender == "vbdl" else given[0]
        if float((probs - expected).abs().max()) > 1e-5:
            raise AssertionError(f"{contender} answers otherwise: {float((probs - expected).abs().max()):.1e}")
    return {contender: (lambda answer=answer: answer(x)) for contender, answer in answers.items()}


def peer_training(model: nn.Module, data: tuple[Tensor, Tensor], members: int, epochs: int, batch: int) -> float:
    """The usual loop on torch-uncertainty's layers; returns its seconds."""
    begun = time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*data), batch, shuffle=True)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.repeat(members, *[1] * (x.ndim - 1))), y.repeat(members))
            loss.backward()
            optimizer.step()
    return time.perf_counter() - begun


def our_training(q: Any, data: tuple[Tensor, Tensor], epochs: int, batch: int, compile: bool) -> float:
    loader = DataLoader(TensorDataset(*data), batch, shuffle=True)
    history = vbdl.fit(q, loader, vbdl.Categorical(), epochs=epochs, lr=1e-3, compile=compile, progress=False)
    return history.seconds - history.compile_seconds


def train(method: str, name: str, rounds: int) -> list[dict[str, Any]]:
    members, data = MEMBERS[name], rows(name, BATCH * STEPS[name])
    q = posterior(method, network(name), members)
    contenders: dict[str, Callable[[], float]] = {
        "vbdl": lambda: our_training(copy.deepcopy(q), data, 1, BATCH, False),
        "vbdl, compiled": lambda: our_training(copy.deepcopy(q), data, 1, BATCH, True),
    }
    if HAS_PEER:
        model = peer(method, q, network(name))
        contenders["torch-uncertainty"] = lambda: peer_training(copy.deepcopy(model), data, members, 1, BATCH)
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for contender, run in contenders.items():
            seconds[contender].append(run())
    ratio = lambda c: statistics.median(a / b for a, b in zip(seconds["vbdl"], seconds[c], strict=True))
    return [
        {"contender": c, "step_ms": 1e3 * statistics.median(seconds[c]) / STEPS[name], "ratio": 1 / ratio(c)}
        for c in contenders
    ]


def scores(probs: Tensor, y: Tensor) -> dict[str, float]:
    confidence, label = probs.max(1)
    right = (label == y).float()
    bins = (confidence * 10).long().clamp_max(9)
    calibration = sum(
        float((confidence[bins == b].mean() - right[bins == b].mean()).abs() * (bins == b).float().mean())
        for b in bins.unique()
    )
    nll = -probs.gather(1, y.unsqueeze(1)).clamp_min(1e-12).log().mean()
    return {"nll": float(nll), "accuracy": float(right.mean()), "calibration": calibration}


def quality(method: str, seeds: int, epochs: int = 30) -> list[dict[str, Any]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    members, found = MEMBERS["mlp"], {c: [] for c in ("vbdl", "torch-uncertainty", "one network")}
    for seed in range(seeds):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        fitted, held = order[: len(y) // 2], order[len(y) // 2 :]
        data = x[fitted], y[fitted]
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
        q, single = posterior(method, net, members, seed), vbdl.Deterministic(net)
        model = peer(method, q, net) if HAS_PEER else None
        options: dict[str, Any] = {"epochs": epochs, "batch_size": 64, "lr": 1e-3, "progress": False, "seed": seed}
        for name, one in (("vbdl", q), ("one network", single)):
            seconds = vbdl.fit(one, data, vbdl.Categorical(), **options).seconds
            probs = vbdl.Predictor(one, vbdl.Categorical(), compile=False)(x[held]).probs
            found[name].append(scores(probs, y[held]) | {"seconds": seconds})
        if model is not None:
            torch.manual_seed(seed)
            seconds = peer_training(model, data, members, epochs, 64)
            with torch.no_grad():
                probs = repeated(model.eval(), members)(x[held])[0]
            found["torch-uncertainty"].append(scores(probs, y[held]) | {"seconds": seconds})
    mean = lambda runs, key: statistics.mean(r[key] for r in runs)
    error = lambda runs: statistics.stdev(r["nll"] for r in runs) / len(runs) ** 0.5
    keys = ("nll", "accuracy", "calibration", "seconds")
    return [
        {"contender": c, "seeds": len(runs), "nll_error": error(runs), **{k: mean(runs, k) for k in keys}}
        for c, runs in found.items()
        if runs
    ]


def report(results: list[dict[str, Any]]) -> str:
    """Markdown tables of the cells; the last of equal rows counts."""
    last = {(r["cell"], r["method"], r["network"], r["rows"], r["contender"]): r for r in results}
    lines = [
        "| Cell | Method | Network | Rows | Contender | Time | Times vbdl |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in last.values():
        if r["cell"] == "quality":
            continue
        time_of = f"{r['step_ms']:.3g} ms a step" if r["cell"] == "train" else f"{r['wall_ms']:.3g} ms"
        cell = f"| {r['cell']} | {r['method']} | {r['network']} | {r['rows']} | {r['contender']}"
        lines.append(f"{cell} | {time_of} | {r['ratio']:.2f} |")
    lines += ["", "| Method | Contender | NLL | Accuracy | ECE | Training |", "| --- | --- | --- | --- | --- | --- |"]
    for r in last.values():
        if r["cell"] == "quality":
            lines.append(
                f"| {r['method']} | {r['contender']} | {r['nll']:.4f} ± {r['nll_error']:.4f} | {r['accuracy']:.2%} | "
                f"{r['calibration']:.4f} | {r['seconds']:.1f} s |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="predict,train,quality")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--networks", default="mlp,cnn")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of a cell")
    parser.add_argument("--rounds", type=int, default=9, help="the fewest rounds of a cell")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the stored results and run nothing")
    options = parser.parse_args()
    if options.table:
        print(report([json.loads(text) for text in options.out.read_text().splitlines()]))
        return
    torch.set_num_threads(1)
    about, kinds = {"commit": commit(), "machine": speed.machine()}, options.cells.split(",")

    def keep(cell: dict[str, Any], found: list[dict[str, Any]]) -> None:
        with options.out.open("a") as file:
            for row in found:
                rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
                print(json.dumps({**cell, **rounded}))
                file.write(json.dumps({**cell, **rounded, **about}) + "\n")

    for method in options.methods.split(","):
        for name in options.networks.split(","):
            if "predict" in kinds:
                for count in ROWS:
                    timings = speed.interleave(predict_runs(method, name, count), options.seconds, options.rounds)
                    found = [
                        {"contender": c, "wall_ms": 1e3 * t.wall, "cpu_ms": 1e3 * t.cpu, "ratio": 1 / t.ratio}
                        for c, t in timings.items()
                    ]
                    keep({"cell": "predict", "method": method, "network": name, "rows": count}, found)
            if "train" in kinds:
                cell = {"cell": "train", "method": method, "network": name, "rows": BATCH}
                keep(cell, train(method, name, min(options.rounds, 5)))
        if "quality" in kinds:
            cell = {"cell": "quality", "method": method, "network": "mlp", "rows": 0}
            keep(cell, quality(method, options.seeds))


if __name__ == "__main__":
    main()
