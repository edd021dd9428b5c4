"""Time predictions with a Gaussian posterior of the last layer of a small CNN, by the factor of its covariance.

    OMP_NUM_THREADS=1 python benchmarks/last_layer.py [--classes 10,100,1000] [--samples 64] [--rounds 15]
                                                      [--out benchmarks/results/last-layer.jsonl]

64 images (1, 28, 28), 256 features, compiled, one thread. Columns: the network alone, compiled with one draw by
`vbdl.Deterministic`; then, in milliseconds a batch, what the plan chooses, `joint=True` (drawn weights) and
`estimator="moments"`. The contenders run in turn in every round; times are medians, spread is the median absolute
deviation. Probabilities of plan and weights are compared before timing, by their standard errors. Peak memory is that
of the process after all contenders of a row.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from vbdl_kernels import CONTRACT

sys.path.insert(0, str(Path(__file__).parent))

from speed import machine

from vbdl import Categorical, Deterministic, Predictor
from vbdl.nn.gaussian import Dense, Diagonal, Factor, GaussianNetwork, Kronecker, LowRank
from vbdl.nn.objective import KeyedPosterior

WIDTH, ROWS, RANK = 256, 64, 20
FACTORS = {"kronecker": Kronecker, "diagonal": Diagonal, "low rank": lambda p: LowRank(p, RANK), "dense": Dense}
LARGEST_DENSE = 5000  # weights; their covariance has as many numbers squared


class Posterior(KeyedPosterior):
    """The posterior of a GaussianNetwork with any factors."""

    def __init__(self, network: GaussianNetwork):
        super().__init__()
        self.module, self.seed = network, 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def network(classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    pool = lambda: (nn.ReLU(), nn.MaxPool2d(2))
    features = (nn.Conv2d(1, 16, 3), *pool(), nn.Conv2d(16, 32, 3), *pool(), nn.Flatten(), nn.Linear(800, WIDTH))
    return nn.Sequential(*features, nn.ReLU(), nn.Linear(WIDTH, classes)).eval()


def filled(factor: Factor) -> Factor:
    """The factor with the curvature of no data set, but of the usual size."""
    with torch.no_grad():
        for name, t in factor.named_buffers():
            if "values" in name or "curvature" in name:
                t.uniform_(0.0, 30.0)
            elif "std" in name or "deviations" in name:
                t.normal_(0.0, 0.05).abs_()
            elif name == "prior_precision":
                t.fill_(20.0)
    return factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default="10,100,1000")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, settings = torch.randn(ROWS, 1, 28, 28), dict(tiles=(ROWS,), compile=True)
    print(f"{'classes':>7} {'covariance':>10} {'alone':>8} {'plan':>8} {'weights':>8} {'moments':>8}  draws  GiB")
    for classes in map(int, options.classes.split(",")):
        net = network(classes)
        head = {n: p for n, p in net.named_parameters() if n.startswith(f"{len(net) - 1}.")}
        for name, make in FACTORS.items():
            if name == "dense" and sum(p.numel() for p in head.values()) > LARGEST_DENSE:
                continue
            q = Posterior(GaussianNetwork(net, [filled(make(head))])).eval()
            drawn = Predictor(q, Categorical(), options.samples, **settings)
            contenders = {
                "alone": Predictor(Deterministic(net), Categorical(), **settings),
                "plan": drawn,
                "weights": drawn.replace(joint=True),
                "moments": drawn.replace(estimator="moments"),
            }
            found = {n: p(x) for n, p in contenders.items()}
            error = (found["plan"].standard_error.square() + found["weights"].standard_error.square()).sqrt().max()
            apart = (found["plan"].probs - found["weights"].probs).abs().max()
            if apart > 6 * error:
                raise SystemExit(
                    f"{name}, {classes} classes: plan and weights differ by {apart:.2g} (error {error:.2g})"
                )
            times: dict[str, list[float]] = {n: [] for n in contenders}
            for _ in range(options.rounds):
                for n, p in contenders.items():
                    start = time.perf_counter()
                    p(x)
                    times[n].append((time.perf_counter() - start) * 1e3)
            typical = {n: median(t) for n, t in times.items()}
            spread = {n: median(abs(v - typical[n]) for v in t) for n, t in times.items()}
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            what = "outputs" if "draw their outputs" in drawn.explain() else "weights"
            row = " ".join(f"{t:8.2f}" for t in typical.values())
            print(f"{classes:>7} {name:>10} {row}  {what} {memory:.2f}", flush=True)
            if options.out:
                line = {
                    "classes": classes,
                    "covariance": name,
                    "samples": options.samples,
                    "ms": typical,
                    "spread": spread,
                }
                line |= {"draws": what, "peak_gib": memory, "machine": machine(), "contract": CONTRACT}
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
