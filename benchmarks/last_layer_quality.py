"""Test NLL of a last-layer Laplace approximation of vbdl and of laplace-torch, on the same networks. CPU, one thread.

    pip install laplace-torch==0.3
    vbdl bench --data FOLDER --sets pneumonia --splits 3 --hold-out 0.1 --protocol own --methods deterministic --out RUN
    python -P benchmarks/last_layer_quality.py FOLDER RUN [--out benchmarks/results/last-layer-quality.jsonl]

The networks are those that the run has trained on PneumoniaMNIST, whose test images are from another source than the
training images. Both libraries get the same training rows, choose one prior precision by the evidence, and average
1,000 draws; laplace-torch also predicts by its default, the probit approximation. Its Kronecker factors treat the bias
as independent of the weights, so vbdl's do here, too. -P, because benchmarks/laplace.py has the name of that library.
"""

import argparse
import importlib
import json
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vbdl
from vbdl.bench import registry
from vbdl.bench.methods.shared import Trained, trained_networks
from vbdl.bench.sizes import resized
from vbdl.bench.source import Source
from vbdl.bench.task import Run, Task

SPLITS, HELD, DRAWS = 3, 0.1, 1000


def nll(probs: Tensor, y: Tensor) -> float:
    return float(vbdl.metrics.categorical_nll(probs.detach(), y).mean())


def of_vbdl(structure: str, trained: Trained, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict:
    q = vbdl.Laplace(trained.network, structure=structure, joint_bias=structure == "full")
    begun = time.perf_counter()
    vbdl.fit(q, data, vbdl.Categorical(), epochs=0, progress=False)
    seconds = time.perf_counter() - begun
    probs = vbdl.Predictor(q, vbdl.Categorical(), DRAWS, compile=False)(test[0]).probs
    assert probs is not None
    return {"prior": q.prior_precision, "fit_s": round(seconds, 3), "draws": nll(probs, test[1])}


def of_laplace_torch(
    structure: str, trained: Trained, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict:
    Laplace = importlib.import_module("laplace").Laplace
    hessian = {"kronecker": "kron", "full": "full"}[structure]
    la = Laplace(trained.network, "classification", subset_of_weights="last_layer", hessian_structure=hessian)
    begun = time.perf_counter()
    la.fit(DataLoader(TensorDataset(*data), batch_size=128))
    la.optimize_prior_precision(method="marglik")
    seconds = time.perf_counter() - begun
    predicted = {
        name: nll(la(test[0], link_approx=link, n_samples=DRAWS), test[1])
        for name, link in (("draws", "mc"), ("probit", "probit"))
    }
    return {"prior": float(la.prior_precision), "fit_s": round(seconds, 3), **predicted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/last-layer-quality.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    registry.load_builtin()
    task: Task = resized(registry.DATASETS["pneumonia"].make(Source(options.data), "own"), None, SPLITS, HELD)
    networks = options.run / "networks" / "pneumonia.safetensors"
    if not networks.is_file():
        raise SystemExit(f"there is no {networks}: run vbdl bench first, as the docstring says")
    lines = []
    for split, trained in enumerate(trained_networks(task, Run(networks=networks, progress=False))):
        trained.network.eval()
        test = task.test[0][split], task.test[1][split]
        line: dict = {"split": split, "network": nll(trained.network(test[0]).softmax(-1), test[1])}
        for structure in ("kronecker", "full"):
            line[f"vbdl {structure}"] = of_vbdl(structure, trained, task.training(split), test)
            line[f"laplace-torch {structure}"] = of_laplace_torch(structure, trained, task.training(split), test)
        print(line, flush=True)
        lines.append(json.dumps(line))
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
