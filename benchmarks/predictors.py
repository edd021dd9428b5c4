"""Predictors on a GPU: the workloads of `benchmarks/speed.py`, Predictor against the tutorial loop.

    python benchmarks/predictors.py [--out DIR]      one JSON line a row
    python benchmarks/predictors.py --check          the smallest of them once, on the CPU, nothing timed

Contenders: the loop one would have written (one eager forward pass a draw), the Predictor warmed up with its tile the
batch, the same drawing weights (`joint`), in bfloat16, and uncompiled. Before anything is timed each Predictor on the
GPU is compared with the same on the CPU, whose draws are the same. Contenders in turn, medians of wall-clock time with
the device waited for; compile time is its own column.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from workloads import WORKLOADS, Workload, networks

from vbdl import Gaussian, MeanField, Predictor

BATCHES = (1, 32, 256)
# of a probability or mean: products of tf32 or bfloat16 differ from a CPU's float32 by roundings of every layer
ALLOWED = {"float32": 5e-3, "bfloat16": 3e-2}
_CHECKED = 4  # rows compared


def contenders(workload: Workload, device: str, rows: int, compile: bool) -> dict[str, Callable[[], object]]:
    """name -> what makes the call; a Predictor's is compared with the CPU's before it is returned."""
    torch.manual_seed(0)
    q, likelihood = workload.posterior().eval(), workload.likelihood().eval()
    x = torch.randn(rows, *workload.row)
    on_device = x.to(device)
    end = (lambda y: y) if isinstance(likelihood, Gaussian) else (lambda y: y.softmax(-1))

    def loop() -> Callable[[], object]:
        called = [copy.deepcopy(n).to(device) for n in networks(q)]
        count = workload.n_samples
        return lambda: end(torch.stack([called[s % len(called)](on_device) for s in range(count)])).mean(0)

    def vbdl(**settings) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            given = {"compile": compile, **settings}
            predict = Predictor(q, likelihood, workload.n_samples, tiles=(rows,), device=device, **given)
            predict.warm_up((rows,), example=on_device)
            settings_here = {k: v for k, v in settings.items() if k == "joint"}
            plain = Predictor(q, likelihood, workload.n_samples, tiles=(rows,), compile=False, **settings_here)
            expected = plain(x[:_CHECKED]).mean if rows > _CHECKED else plain(x).mean
            found = predict(on_device).mean[: len(expected)].float().cpu()
            far = float((found - expected).abs().max())
            allowed = ALLOWED["bfloat16" if "autocast" in settings else "float32"]
            if not far <= allowed:
                raise AssertionError(f"{workload.name} {rows} {settings}: differs by {far:.1e}, allowed {allowed:.0e}")
            return lambda: predict(on_device)

        return make

    found = {"loop": loop, "vbdl": vbdl(), "vbdl uncompiled": vbdl(compile=False)}
    found["vbdl bfloat16"] = vbdl(autocast=torch.bfloat16)
    if isinstance(q, MeanField):
        found["vbdl joint"] = vbdl(joint=True)
        found["vbdl joint bfloat16"] = vbdl(joint=True, autocast=torch.bfloat16)
    return found


def timed(runs: dict[str, Callable[[], object]], device: str, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds, contenders in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            taken[name].append((time.perf_counter() - begun) * 1e3)
    return {name: statistics.median(t) for name, t in taken.items()}


def cell(workload: Workload, rows: int, device: str, compile: bool, emit: Callable[[dict], None]) -> None:
    case = {"goal": "predictor", "workload": workload.name, "batch": rows}
    runs, seconds = {}, {}
    for name, make in contenders(workload, device, rows, compile).items():
        begun = time.perf_counter()
        try:
            runs[name] = make()
        except Exception as error:  # one that fails is a row, and the others are measured all the same
            emit({**case, "provider": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]})
            continue
        runs[name]()
        seconds[name] = round(time.perf_counter() - begun, 2)
    times = timed(runs, device)
    for name, ms in times.items():
        speed = times["loop"] / ms
        emit({**case, "provider": name, "compile_s": seconds[name], "ms": ms, "times_the_first": speed})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--check", action="store_true", help="the smallest once, on the CPU, uncompiled")
    given = parser.parse_args()
    by_name = {w.name: w for w in WORKLOADS}
    with torch.no_grad():
        if given.check:
            for name in ("W1", "W4-tiny"):
                for make in contenders(by_name[name], "cpu", 2, compile=False).values():
                    make()()
            print("predictors agree with the CPU's")
            return
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: --check runs what can be run without one")
        torch.set_float32_matmul_precision("high")  # tf32 for the loop and vbdl alike
        given.out.mkdir(parents=True, exist_ok=True)
        card = torch.cuda.get_device_name().replace(" ", "-").lower()
        with (given.out / f"predictors-{card}.jsonl").open("w") as file:

            def emit(row: dict) -> None:
                line = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
                print(line, flush=True)
                file.write(line + "\n")
                file.flush()

            # the methods first at their usual batch, then the rest
            for rows in (32, *(b for b in BATCHES if b != 32)):
                for name in ("W3", "W1", "W4-tiny", "W2", "W5-head", "W5-blocks", "W4-32", "W4-5"):
                    cell(by_name[name], rows, "cuda", True, emit)


if __name__ == "__main__":
    main()
