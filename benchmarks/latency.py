"""Measure the latency of single rows: predictor, exported package, torch.compile and eager torch.

    python benchmarks/latency.py [--methods dropout mean-field ensemble] [--rounds 200]

The network is 32-256-256-10 with 16 draws or members, on one thread, with batch 1; p50 and p99 are over calls of all
contenders in turn. "eager" is hand-written torch: one forward pass per draw with torch's dropout or with weights from
torch.randn, or vmap over stacked members. "torch.compile" is the same function compiled. Like the others, both return
probabilities and their entropies. Outputs are compared before timing: the package, ONNX and the members to 1e-5, draws
of torch's generator to six Monte Carlo standard errors.

"compile" is the time of the first call (predictor, torch.compile) or of the export; "load + first" is the time of
loading the package and of one call in a fresh process, after its imports.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import vbdl
from vbdl.export import export

DRAWS, FEATURES, CLASSES = 16, 32, 10
RESULTS = Path(__file__).parent / "results"

_FRESH = """
import sys, time, torch
torch.set_num_threads(1)
import vbdl.export, numpy, onnxruntime
from vbdl.export import load_package
x = torch.zeros(1, 32)
begun = time.perf_counter()
load_package(sys.argv[1])(x)
print(time.perf_counter() - begun)
"""


def network(dropout: bool) -> nn.Module:
    """A network 32-256-256-10, with or without dropout before each of the last two layers."""
    drop = [nn.Dropout(0.1)] if dropout else []
    widths = (FEATURES, 256, 256)
    body = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU(), *drop)]
    return nn.Sequential(*body, nn.Linear(256, CLASSES))


def summary(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(samples, rows, classes) -> probabilities, total, aleatoric, epistemic."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp().mean(0)
    total = -(probs * probs.log()).sum(-1)
    aleatoric = -(log_probs.exp() * log_probs).sum(-1).mean(0)
    return probs, total, aleatoric, total - aleatoric


def baseline(method: str, posterior):
    """A function that predicts in plain torch, without vbdl."""
    if method == "dropout":
        net = posterior.module.inner.train()
        return lambda x: summary(torch.stack([net(x) for _ in range(DRAWS)]))
    if method == "mean-field":
        sampled = posterior.module
        means = {n: p.detach() for n, p in sampled.inner.named_parameters()}
        stds = {n: sampled.log_std[n].detach().exp() for n in means}

        def draw(x):
            weights = {n: means[n] + stds[n] * torch.randn_like(means[n]) for n in means}
            return functional_call(sampled.inner, weights, (x,))

        return lambda x: summary(torch.stack([draw(x) for _ in range(DRAWS)]))
    members = [network(False) for _ in range(DRAWS)]
    for index, member in enumerate(members):
        member.load_state_dict(posterior.member(index))
    parameters, buffers = stack_module_state(members)
    shell = network(False).to("meta")
    every = vmap(lambda p, b, x: functional_call(shell, (p, b), (x,)), in_dims=(0, 0, None))
    return lambda x: summary(every(parameters, buffers, x))


def seconds(call, x) -> float:
    begun = time.perf_counter()
    call(x)
    return time.perf_counter() - begun


def run(method: str, rounds: int) -> dict:
    """Measure p50 and p99 of every contender, the compile time, and the start of a fresh process."""
    torch.manual_seed(0)
    posterior = {
        "dropout": lambda: vbdl.MCDropout(network(True)),
        "mean-field": lambda: vbdl.MeanField(network(False), 1000, initial_std=0.02),
        "ensemble": lambda: vbdl.DeepEnsemble([network(False) for _ in range(DRAWS)]),
    }[method]()
    predict = vbdl.Predictor(posterior, vbdl.Categorical(), n_samples=DRAWS, tiles=(1,), compile=True)
    rows = torch.randn(64, FEATURES)
    x = rows[:1].contiguous()
    compile_seconds = {"predictor": seconds(predict, x)}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(scratch) / "aoti"
        begun = time.perf_counter()
        package = export(predict, folder, example=rows)
        compile_seconds["package"] = time.perf_counter() - begun
        begun = time.perf_counter()
        onnx = export(predict, Path(scratch) / "onnx", backend="onnx", example=rows)
        compile_seconds["onnx"] = time.perf_counter() - begun
        eager = baseline(method, predict.posterior)
        compiled = torch.compile(eager)
        compile_seconds["torch.compile"] = seconds(compiled, x)
        first = {
            name: statistics.median(
                float(subprocess.run([sys.executable, "-c", _FRESH, str(Path(scratch) / folder)], check=True,
                                     capture_output=True, text=True).stdout)
                for _ in range(3)
            )
            for name, folder in (("package", "aoti"), ("onnx", "onnx"))
        }  # fmt: skip
        contenders = {
            "predictor": predict,
            "package": package,
            "onnx": onnx,
            "torch.compile": compiled,
            "eager": eager,
        }
        expected = predict(x)
        for name in ("package", "onnx"):
            torch.testing.assert_close(contenders[name](x)["probs"], expected.probs, rtol=0, atol=1e-5)
        error = 1e-5 if method == "ensemble" else 6 * 2**0.5 * expected.standard_error.max().item()
        for name in ("torch.compile", "eager"):
            torch.testing.assert_close(contenders[name](x)[0], expected.probs, rtol=0, atol=error)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 20):
            for name, call in contenders.items():
                took = seconds(call, x)
                if number >= 20:
                    times[name].append(took)
    p = lambda name, q: sorted(times[name])[min(rounds - 1, int(q * rounds))] * 1e6
    return {
        "benchmark": "latency",
        "method": method,
        "draws": DRAWS,
        "p50_us": {n: round(p(n, 0.5), 1) for n in contenders},
        "p99_us": {n: round(p(n, 0.99), 1) for n in contenders},
        "compile_s": {n: round(v, 2) for n, v in compile_seconds.items()},
        "load_and_first_s": {n: round(v, 4) for n, v in first.items()},
        "package_first_over_compile": {
            n: round(first["package"] / compile_seconds[n], 4) for n in ("predictor", "torch.compile", "package")
        },
        "torch": str(torch.__version__),
        "processor": platform.processor() or platform.machine(),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["dropout", "mean-field", "ensemble"])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    results = []
    for method in options.methods:
        results.append(run(method, options.rounds))
        print(json.dumps(results[-1]), flush=True)
        with open(RESULTS / "latency-cpu.jsonl", "a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    print("\n| method | contender | p50, us | p99, us | compile, s | load + first, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for one in results:
        for name in one["p50_us"]:
            compile_s, first = one["compile_s"].get(name, ""), one["load_and_first_s"].get(name, "")
            print(
                f"| {one['method']} | {name} | {one['p50_us'][name]} | {one['p99_us'][name]} | {compile_s} | {first} |"
            )


if __name__ == "__main__":
    main()
