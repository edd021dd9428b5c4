"""Compare stacked training of all splits and members with training one network after the other.

    python benchmarks/stacking.py [--data FOLDER] [--set boston] [--members 5] [--epochs 40] [--out FILE]

The deep ensemble of the UCI suite: splits x members networks of one hidden layer, batches of 100. Contenders:

    torch loop       plain torch by hand: a network, an Adam and a loop over batches for each
    stacked          vbdl.fit of all of them as one ensemble, uncompiled, and compiled (compiling is a column)

Before anything is timed the networks of two splits, each trained by vbdl.fit alone, are compared with those of
"stacked", weight by weight: the same seeds give the same training to rounding. The torch loop draws other numbers; its
test RMSE is printed beside. Without --data the set is scikit-learn's diabetes on 20 random splits.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import vbdl
from vbdl.bench import registry
from vbdl.bench.datasets.splits import regression, standard_splits
from vbdl.bench.networks import one_hidden
from vbdl.bench.provenance import provenance
from vbdl.bench.source import Source
from vbdl.bench.task import Task

BATCH, LR = 100, 0.01


def load(data: Path | None, name: str) -> Task:
    registry.load_builtin()
    if data is not None:
        return registry.DATASETS[name].make(Source(data), "2016")
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    network = lambda p, outputs: one_hidden(10, 50, p, outputs)
    return regression("diabetes", x, y.astype(np.float64), standard_splits(442, 20), 398, network=network)


def torch_loop(task: Task, members: int, epochs: int) -> list[nn.Module]:
    trained = []
    for split in range(task.n_splits):
        x, y = task.x[split, : task.n_train], task.y[split, : task.n_train, 0]
        for member in range(members):
            torch.manual_seed(split * members + member)
            network = task.network(0.0, 2)
            optimizer = torch.optim.Adam(network.parameters(), lr=LR, fused=True)
            for _ in range(epochs):
                order = torch.randperm(len(x))
                for start in range(0, len(x), BATCH):
                    rows = order[start : start + BATCH]
                    mean, log_variance = network(x[rows]).unbind(-1)
                    loss = nn.functional.gaussian_nll_loss(mean, y[rows], log_variance.exp())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            trained.append(network)
    return trained


def one_by_one(task: Task, count: int, members: int, epochs: int) -> list[vbdl.DeepEnsemble]:
    x, y = task.rows
    trained = []
    for number in range(count):
        q = vbdl.DeepEnsemble(task.network(0.0, 2), 1, seed=number)
        rows = task.numbers(0, task.n_train)[number // members].unsqueeze(0)
        fit(q, x, y, rows, epochs, number, compile=False)
        trained.append(q)
    return trained


def stacked(task: Task, members: int, epochs: int, compile: bool) -> tuple[vbdl.DeepEnsemble, float]:
    x, y = task.rows
    q = vbdl.DeepEnsemble(task.network(0.0, 2), task.n_splits * members, seed=0)
    rows = task.numbers(0, task.n_train).repeat_interleave(members, dim=0)
    return q, fit(q, x, y, rows, epochs, 0, compile).compile_seconds


def fit(q, x, y, rows, epochs, seed, compile):
    return vbdl.fit(
        q,
        (x, y),
        vbdl.HeteroscedasticGaussian(),
        epochs=epochs,
        batch_size=BATCH,
        optimizer=lambda ps: torch.optim.Adam(ps, lr=LR, fused=True),
        member_rows=rows,
        seed=seed,
        compile=compile,
        progress=False,
    )


def rmse(task: Task, networks: list[nn.Module], members: int) -> float:
    x, y = task.test
    errors = []
    for split in range(task.n_splits):
        own = networks[split * members : (split + 1) * members]
        with torch.no_grad():
            mean = torch.stack([n(x[split])[:, 0] for n in own]).mean(0)
        errors.append(task.scale[split] * math.sqrt(float((mean - y[split, :, 0]).square().mean())))
    return sum(errors) / len(errors)


def members_of(q: vbdl.DeepEnsemble, task: Task) -> list[nn.Module]:
    networks = []
    for m in range(q.n_members):
        network = task.network(0.0, 2)
        network.load_state_dict(q.member(m))
        networks.append(network)
    return networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("VBDL_DATA"))
    parser.add_argument("--set", default="boston")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append one JSON line per contender to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load(options.data, options.set)
    count, members, epochs = task.n_splits * options.members, options.members, options.epochs
    short = stacked(task, members, 2, compile=True)[0]
    for number, alone in enumerate(one_by_one(task, 2 * members, members, 2)):
        for name, weight in alone.member(0).items():
            torch.testing.assert_close(weight, short.member(number)[name], rtol=1e-4, atol=1e-5)
    print(f"{task.name}: {count} networks, {epochs} epochs of {task.n_train} rows; stacked = one by one, to rounding")
    contenders = {
        "torch loop": lambda: (torch_loop(task, members, epochs), 0.0),
        "stacked": lambda: stacked(task, members, epochs, False),
        "stacked, compiled": lambda: stacked(task, members, epochs, True),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    quality: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            begun = time.perf_counter()
            trained, compiling = run()
            times[name].append((time.perf_counter() - begun - compiling, compiling))
            if name in ("torch loop", "stacked, compiled"):
                networks = trained if isinstance(trained, list) else members_of(trained, task)
                quality[name] = rmse(task, networks, members)
    loop = sorted(t for t, _ in times["torch loop"])[options.rounds // 2]
    about = provenance()
    print(f"{'contender':20} {'seconds':>8} {'against the loop':>17} {'compiling':>10} {'test RMSE':>10}")
    for name, taken in times.items():
        seconds, compiling = (sorted(column)[options.rounds // 2] for column in zip(*taken, strict=True))
        error = f"{quality[name]:10.4g}" if name in quality else ""
        print(f"{name:20} {seconds:8.2f} {loop / seconds:16.1f}x {compiling:10.1f} {error}")
        if options.out is not None:
            line = {"set": task.name, "contender": name, "networks": count, "epochs": epochs, "seconds": seconds}
            line |= {"compile_seconds": compiling, "ratio": loop / seconds, "rmse": quality.get(name), **about}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
