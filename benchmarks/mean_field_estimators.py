"""Variance of the gradient and speed of training of `MeanField(estimator=...)`. CPU, one thread.

    python benchmarks/mean_field_estimators.py [--out benchmarks/results/mean-field-estimators-cpu.jsonl]

Scikit-learn's handwritten digits, 1,400 training rows, a dense network 64-100-100-10 and a convolutional one, both with
prior std 0.3, trained with Adam for 60 epochs of 64 rows, uncompiled. "shared x2" is the shared estimator with
two draws a step, which costs about as much as the others.

For each network and estimator, a line of JSON has
* variance: of the gradient, summed over the means and over the log stds, each divided by that of one shared draw, at
  the same weights: those of "shared" after 20 epochs, over 200 steps of one batch;
* ms: processor milliseconds of a step, the median over epochs; trainings take turns epoch by epoch;
* negative_elbo: of the training rows, nats per row, over 8 draws of the weights shared by all rows, after the last
  epoch; mean and range over two seeds;
* epochs and seconds: until that of the shared estimator after its last epoch is reached, by seed; None: never.
"""

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from speed import machine
from torch import Tensor, nn

import vbdl
from vbdl.calling.stacking import call_stacked
from vbdl.calling.traversing import state_of

ROWS, BATCH, EPOCHS, SEEDS, DRAWS, LR = 1400, 64, 60, 2, 8, 3e-3
ESTIMATORS: dict[str, dict[str, Any]] = {
    "shared": {},
    "shared x2": {"n_samples": 2},
    "flipout": {"estimator": "flipout"},
    "local": {"estimator": "local"},
}


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


NETWORKS = {"dense": dense, "conv": conv}


class Watched(vbdl.MeanField):
    """Waits for its turn after each epoch, and records the processor seconds and the negative ELBO of each."""

    def after_epoch(self, epoch: int) -> None:
        self.seconds.append(time.thread_time() - self.begun)
        self.states.append({n: t.detach().clone() for n, t in state_of(self.module).items()})
        self.hand_over()
        self.begun = time.thread_time()


def watched(network: str, name: str, seed: int) -> Watched:
    torch.manual_seed(seed)
    q = Watched(NETWORKS[network](), ROWS, prior=0.3, initial_std=0.02, seed=seed, **ESTIMATORS[name])
    q.seconds, q.states, q.begun = [], [], 0.0
    return q


def train(network: str, seed: int, data: tuple[Tensor, Tensor]) -> dict[str, Watched]:
    """Train with all estimators, whose epochs take turns so that a busy machine slows all alike."""
    turns = {name: threading.Semaphore(number == 0) for number, name in enumerate(ESTIMATORS)}
    names, found, failed = list(ESTIMATORS), {}, []

    def run(name: str, following: str) -> None:
        def hand_over() -> None:
            turns[following].release()
            turns[name].acquire()

        turns[name].acquire()
        try:
            q = watched(network, name, seed)
            q.hand_over, q.begun = hand_over, time.thread_time()
            vbdl.fit(q, data, vbdl.Categorical(), epochs=EPOCHS, batch_size=BATCH, lr=LR, seed=seed, compile=False,
                     progress=False)  # fmt: skip
            found[name] = q
        except BaseException as error:
            failed.append(error)
            for turn in turns.values():  # no more turns: let all others run to their ends
                turn.release(2 * EPOCHS)
        finally:
            turns[following].release()

    threads = [threading.Thread(target=run, args=(n, names[(i + 1) % len(names)])) for i, n in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


@torch.no_grad()
def negative_elbo(q: Watched, state: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> float:
    """In nats per row, over `DRAWS` draws of the weights."""
    q.module.load_state_dict(state, strict=False)
    q.eval()
    draws = q.draws(torch.arange(DRAWS), 12345)
    logits = call_stacked(q.module, draws, {n: t for n, t in state_of(q.module).items() if n not in draws}, (data[0],))
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), data[1].repeat(DRAWS))
    return float(nll + q.kl() / ROWS)


def variances(network: str, state: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> dict[str, tuple[float, float]]:
    """The variance of the gradient with each estimator, summed over the means and over the log stds."""
    found = {}
    batch = data[0][:BATCH], data[1][:BATCH]
    for name in ESTIMATORS:
        q = watched(network, name, 0)
        q.module.load_state_dict(state, strict=False)
        q.train()
        q.before_training(*batch, vbdl.Categorical())
        kinds: dict[bool, list[Tensor]] = {False: [], True: []}
        for _ in range(200):
            q.zero_grad()
            q.losses(*batch, vbdl.Categorical()).sum().backward()
            for stds, kept in kinds.items():
                gradients = [p.grad for n, p in q.named_parameters() if ("log_std" in n) == stds]
                kept.append(torch.cat([g.flatten() for g in gradients if g is not None]))
        found[name] = tuple(float(torch.stack(kept).var(0).sum()) for kept in kinds.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mean-field-estimators-cpu.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:ROWS]
    data = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    lines = []
    for network in NETWORKS:
        runs = [train(network, seed, data) for seed in range(SEEDS)]
        curves = {n: [[negative_elbo(r[n], s, data) for s in r[n].states] for r in runs] for n in ESTIMATORS}
        of_gradient = variances(network, runs[0]["shared"].states[19], data)
        for name in ESTIMATORS:
            each = [statistics.median(r[name].seconds) for r in runs]
            final = [curve[-1] for curve in curves[name]]
            epochs = []
            for seed, curve in enumerate(curves[name]):
                target = curves["shared"][seed][-1]
                epochs.append(next((e + 1 for e, value in enumerate(curve) if value <= target), None))
            line = {
                "network": network,
                "estimator": name,
                "variance_means": of_gradient[name][0] / of_gradient["shared"][0],
                "variance_log_stds": of_gradient[name][1] / of_gradient["shared"][1],
                "ms": 1000 * statistics.median(each) / -(-ROWS // BATCH),
                "negative_elbo": statistics.mean(final),
                "negative_elbo_range": [min(final), max(final)],
                "epochs": epochs,
                "seconds": [None if e is None else e * s for e, s in zip(epochs, each, strict=True)],
                "machine": machine(),
            }
            print({n: v for n, v in line.items() if n != "machine"}, flush=True)
            lines.append(json.dumps(line))
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
