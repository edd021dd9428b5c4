"""Compare the Predictor with the tutorial loop on a GPU, on the workloads of `benchmarks/speed.py`.

    python benchmarks/predictors.py [--out DIR] [--workloads W1,W3] [--batches 1,32,256]     one JSON line a row
    python benchmarks/predictors.py --prepare        compile and compare all of them, several at once, nothing timed
    python benchmarks/predictors.py --check          the smallest of them once, on the CPU, nothing timed

Contenders: the tutorial loop (one eager forward pass per draw), and the warmed-up Predictor with the batch as its tile,
also with drawn weights (`joint`) and in bfloat16. Calls alternate between two batches. Before timing, each Predictor on
the GPU is compared with one on the CPU, which has the same draws. Contenders run in turn, and the second of two calls
is timed; times are medians of wall-clock time with the device synchronized. Compile time is a separate column; after
`--prepare` it is the time with filled compiler caches.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from workloads import WORKLOADS, Workload, networks

from vbdl import Gaussian, MeanField, Predictor

BATCHES = (32, 1, 256)  # the most usual first
NAMES = ("W3", "W1", "W4-tiny", "W2", "W5-head", "W5-blocks", "W4-32", "W4-5")  # one of each method first
# of a probability or mean: products of tf32 or bfloat16 differ from a CPU's float32 by roundings of every layer
ALLOWED = {"float32": 5e-3, "bfloat16": 3e-2}
_CHECKED = 4  # rows compared


def contenders(workload: Workload, device: str, rows: int, compile: bool) -> dict[str, Callable[[], object]]:
    """name -> what makes the call; a Predictor's is compared with the CPU's before it is returned."""
    torch.manual_seed(0)
    q, likelihood = workload.posterior().eval(), workload.likelihood().eval()
    x = torch.randn(rows, *workload.row)
    on_device = x.to(device)
    batches = itertools.cycle([on_device, on_device.clone()])
    end = (lambda y: y) if isinstance(likelihood, Gaussian) else (lambda y: y.softmax(-1))

    def loop() -> Callable[[], object]:
        called = [copy.deepcopy(n).to(device) for n in networks(q)]
        count = workload.n_samples

        def run() -> torch.Tensor:
            x = next(batches)
            return end(torch.stack([called[s % len(called)](x) for s in range(count)])).mean(0)

        return run

    def vbdl(**settings) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            chosen = {"compile": compile, **settings}
            predict = Predictor(q, likelihood, workload.n_samples, tiles=(rows,), device=device, **chosen)
            predict.warm_up((rows,), example=on_device)
            settings_here = {k: v for k, v in settings.items() if k == "joint"}
            plain = Predictor(q, likelihood, workload.n_samples, tiles=(rows,), compile=False, **settings_here)
            expected = plain(x[:_CHECKED]).mean if rows > _CHECKED else plain(x).mean
            mean = predict(on_device).mean[: len(expected)].float().cpu()
            far = float((mean - expected).abs().max())
            allowed = ALLOWED["bfloat16" if "autocast" in settings else "float32"]
            if not far <= allowed:
                raise AssertionError(f"{workload.name} {rows} {settings}: differs by {far:.1e}, allowed {allowed:.0e}")
            return lambda: predict(next(batches))

        return make

    calls = {"loop": loop, "vbdl": vbdl()}
    calls["vbdl bfloat16"] = vbdl(autocast=torch.bfloat16)
    if isinstance(q, MeanField):
        calls["vbdl joint"] = vbdl(joint=True)
        calls["vbdl joint bfloat16"] = vbdl(joint=True, autocast=torch.bfloat16)
    return calls


def timed(runs: dict[str, Callable[[], object]], device: str, rounds: int = 15) -> dict[str, float]:
    """Time the contenders in turn, and return the median milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # another contender has cooled the caches, so only the second of two calls is timed
            if device == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            taken[name].append((time.perf_counter() - begun) * 1e3)
    return {name: statistics.median(t) for name, t in taken.items()}


def cell(workload: Workload, rows: int, device: str, compile: bool, rounds: int, emit: Callable[[dict], None]) -> None:
    """rounds: 0 to build and compare only."""
    case = {"goal": "predictor", "workload": workload.name, "batch": rows}
    runs, seconds = {}, {}
    for name, make in contenders(workload, device, rows, compile).items():
        begun = time.perf_counter()
        try:
            runs[name] = make()
            runs[name]()
        except Exception as error:  # a failure becomes a row, and the other contenders are still measured
            runs.pop(name, None)
            message = f"{type(error).__name__}: {error}".strip().splitlines()
            emit({**case, "provider": name, "failed": " ".join(message)[:600]})
            continue
        seconds[name] = round(time.perf_counter() - begun, 2)
    if rounds == 0:
        emit({**case, "provider": f"{len(runs)} agree", "compile_s": sum(seconds.values())})
        return
    times = timed(runs, device, rounds)
    for name, ms in times.items():
        speed = times.get("loop", float("nan")) / ms
        emit({**case, "provider": name, "compile_s": seconds[name], "ms": ms, "times_the_first": speed})


def prepare(names: list[str], batches: list[int]) -> bool:
    """Compile every cell in its own process, as many at once as there are cores."""
    cells = [(name, rows) for rows in batches for name in names]
    at_once = max(1, min(12, (os.cpu_count() or 1) - 2))
    running: list[subprocess.Popen] = []
    failed = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    while cells or running:
        while cells and len(running) < at_once:
            name, rows = cells.pop(0)
            command = [sys.executable, __file__, "--rounds", "0", "--workloads", name, "--batches", str(rows)]
            running.append(subprocess.Popen(command, env=environment))
        time.sleep(0.1)
        failed += sum(p.poll() not in (None, 0) for p in running)
        running = [p for p in running if p.poll() is None]
    return failed == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--workloads", default=",".join(NAMES))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing; 0 only compiles and compares")
    parser.add_argument("--prepare", action="store_true", help="like --rounds 0, with several cells at once")
    parser.add_argument("--check", action="store_true", help="run the smallest cell once, on the CPU, uncompiled")
    options = parser.parse_args()
    names, batches = options.workloads.split(","), [int(b) for b in options.batches.split(",")]
    by_name = {w.name: w for w in WORKLOADS}
    with torch.no_grad():
        if options.check:
            for name in ("W1", "W4-tiny"):
                for make in contenders(by_name[name], "cpu", 2, compile=False).values():
                    make()()
            print("predictors agree with the CPU's")
            return
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: --check runs what can be run without one")
        if options.prepare:
            raise SystemExit(not prepare(names, batches))
        torch.set_float32_matmul_precision("high")  # tf32 for both the loop and vbdl
        file = None
        if options.rounds:
            options.out.mkdir(parents=True, exist_ok=True)
            card = torch.cuda.get_device_name().replace(" ", "-").lower()
            file = (options.out / f"predictors-{card}.jsonl").open("w")
        failed = []

        def emit(row: dict) -> None:
            line = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
            print(line, flush=True)
            if "failed" in row:
                failed.append(row)
            if file is not None:
                file.write(line + "\n")
                file.flush()

        for rows in batches:
            for name in names:
                cell(by_name[name], rows, "cuda", True, options.rounds, emit)
        raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
