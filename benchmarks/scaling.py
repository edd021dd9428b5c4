"""Measure the cost of a prediction against draws, batch and width, and its memory against draws.

    python benchmarks/scaling.py [--what draws,batch,width,memory] [--quick]
                                 [--out benchmarks/results/scaling-cpu.jsonl]

Cost: median microseconds of a warmed-up call on one thread, and the cost of one more draw, row or unit.
Memory: peak resident bytes above those before the first prediction, for statistics only, with each number of draws in
its own process; for 1,000 draws it may be at most 1.1 times that for 100. It is measured uncompiled, to exclude the
compiler's memory. Draws are kept for the next call up to half the memory budget: with the default of 1 GiB these kept
draws grow; with 4 MiB none of 1,000 draws are kept, and memory does not grow.
MALLOC_MMAP_THRESHOLD_ is set because glibc before 2.38 does not reuse freed aligned blocks.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from speed import machine
from workloads import mlp

from vbdl import Categorical, DeepEnsemble, MCDropout, MeanField, Predictor

METHODS = {
    "MC dropout": lambda width: MCDropout(mlp(784, width, width, 10, p=0.5)),
    "mean-field": lambda width: MeanField(mlp(784, width, width, 10), n_data=60_000),
    "ensemble": lambda width: DeepEnsemble(mlp(784, width, width, 10), n_members=16),
}
SWEEPS: dict[str, dict[str, Any]] = {
    "draws": {"values": (8, 32, 100, 316), "settings": lambda v: (v, 32, 512)},
    "batch": {"values": (1, 8, 32, 128, 512), "settings": lambda v: (32, v, 512)},
    "width": {"values": (64, 128, 256, 512, 1024), "settings": lambda v: (32, 32, v)},
}
MEMORY_BUDGETS = (2**30, 2**22)


def microseconds(method: str, draws: int, rows: int, width: int, seconds: float) -> float:
    """The median microseconds of a warmed-up call."""
    torch.manual_seed(0)
    predict = Predictor(METHODS[method](width).eval(), Categorical().eval(), draws, tiles=(rows,), compile=True)
    x = torch.randn(rows, 784)
    predict.warm_up((rows,), example=x)
    predict(x)
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        begun = time.perf_counter()
        predict(x)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1e6


def peak_above_start(method: str, draws: int, budget: int) -> int:
    """The peak resident memory that predicting 256 rows adds in this process, bytes."""
    torch.manual_seed(0)
    q = METHODS[method](512).eval()
    x = torch.randn(256, 784)
    # first a prediction, so that what torch loads and allocates at first use is not counted
    Predictor(METHODS[method](32).eval(), Categorical().eval(), 2, compile=False)(x)
    before = _peak()
    predict = Predictor(q, Categorical().eval(), draws, tiles=(64,), compile=False, memory_budget=budget)
    for _ in range(2):
        predict(x)
    return _peak() - before


def _peak() -> int:
    """Bytes resident at most so far, on Linux. (What `resource` says begins with the peak of the parent process.)"""
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def memory(method: str, budget: int) -> dict:
    """The peak memory for 100 and 1,000 draws, each measured in its own process."""
    peaks = {}
    for draws in (100, 1000):
        command = [sys.executable, __file__, "--child", method, str(draws), str(budget)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks[draws] = int(ran.stdout.split()[-1])
    return {
        "memory_budget": budget,
        "bytes_100": peaks[100],
        "bytes_1000": peaks[1000],
        "ratio": peaks[1000] / peaks[100],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="draws,batch,width,memory")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--quick", action="store_true", help="measure every other size, 0.3 seconds each")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if options.child:
        print(peak_above_start(options.child[0], *map(int, options.child[1:])))
        return
    here, rows = machine(), []
    print(", ".join(f"{k} {v}" for k, v in here.items()))
    for what in options.what.split(","):
        for method in options.methods.split(","):
            if what == "memory":
                if method == "ensemble":
                    continue  # its draws are its members, whose number is fixed
                for budget in MEMORY_BUDGETS:
                    peaks = memory(method, budget)
                    verdict = "ok" if peaks["ratio"] <= 1.1 else "MISSED"
                    print(
                        f"memory  {method:12s} budget {budget / 2**20:5.0f} MiB: {peaks['bytes_100'] / 2**20:8.1f} MiB "
                        f"for 100 draws, {peaks['bytes_1000'] / 2**20:8.1f} for 1,000: {peaks['ratio']:.2f} "
                        f"(at most 1.1) {verdict}",
                        flush=True,
                    )
                    rows.append({"what": what, "method": method, **peaks})
                continue
            if what == "draws" and method == "ensemble":
                continue
            sweep, before = SWEEPS[what], None
            for value in sweep["values"][:: 2 if options.quick else 1]:
                draws, batch, width = sweep["settings"](value)
                cost = microseconds(method, draws, batch, width, 0.3 if options.quick else 1.0)
                more = "" if before is None else f"{(cost - before[1]) / (value - before[0]):10.2f} us each more"
                print(f"{what:7s} {method:12s} {value:6d} {cost:12.1f} us {more}", flush=True)
                rows.append({"what": what, "method": method, "value": value, "us": round(cost, 1)})
                before = value, cost
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps(row | {"machine": here}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
