"""Compare the plan's choice of execution with every other way, forced, on each workload.

    python benchmarks/plans.py [--workloads W1,W3] [--batches 1,32,256] [--samples 32,100] [--seconds 2]
                               [--out benchmarks/results/plans-cpu.jsonl]

The forced ways, if they apply and change the plan: one draw per call or all draws in one call; dropped units masked,
folded into the next weights, or left out; mean-field layers that draw outputs (all layers or the first) or weights.
Otherwise memory sets the number of draws per call. Outputs are compared before timing: equal draws to 2e-5 of a mean,
different draws by their standard errors. All ways run in turn in every round, on one thread; times are medians. The
plan may be at most 15 % slower than the best way, by the lower of wall time and processor time.
"""

import argparse
import contextlib
import gc
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))

from speed import SAME, Z_BOUND, interleave, machine
from workloads import WORKLOADS, Workload

from vbdl import DeepEnsemble, MCDropout, MeanField, Predictor
from vbdl.compiling import rewrite as rewrites

compact = importlib.import_module("vbdl.compiling.rewrite.compact")  # the package's attribute `compact` is the function
ALLOWED = 1.15  # largest ratio of the plan's time to that of the best way
Forced = Callable[[], contextlib.AbstractContextManager]


@contextlib.contextmanager
def dropped_units(way: str) -> Iterator[None]:
    """Whatever the cost model says: "masked", "folded" or "left out"."""
    masked_or_folded = (1.0, 0.0) if way == "folded" else (0.0, 1.0)
    costs = compact._costs

    def forced(*arguments: Any) -> tuple[float, float, int]:
        _, _, size = costs(*arguments)
        return 1.0, 0.0 if way == "left out" else 2.0, size  # what does not fit stays as it is

    with (
        patch.object(compact, "_costs", forced),
        patch.object(compact, "_masked_or_folded", lambda *_: masked_or_folded),
    ):
        yield


def ways(workload: Workload, draws: int) -> dict[str, tuple[dict[str, Any], Forced]]:
    """name -> settings of the predictor, and what is forced while it plans."""
    free = contextlib.nullcontext
    forced: dict[str, tuple[dict[str, Any], Forced]] = {
        "plan": ({}, free),
        "one draw a call": ({"chunk_size": 1}, free),
        "all draws in a call": ({"chunk_size": draws}, free),
    }
    if workload.method is MCDropout:
        for way in ("masked", "folded", "left out"):
            forced[f"dropped units {way}"] = ({}, lambda way=way: dropped_units(way))
    if workload.method is MeanField:
        for name, rows in (("of every layer", sys.maxsize), ("of the first layer", 0)):
            forced[f"outputs {name} drawn"] = ({}, lambda rows=rows: patch.object(rewrites, "MANY_ROWS", rows))
        forced["weights drawn"] = ({"joint": True}, free)
    return forced


def agree(prediction: Any, plan: Any, same_draws: bool) -> bool:
    """Whether two predictions agree: the same draws, or draws of the same distribution."""
    difference = prediction.mean - plan.mean
    if same_draws:
        return float(difference.abs().max()) <= SAME["float32"]
    scale = (prediction.standard_error.square() + plan.standard_error.square()).sqrt()
    return float((difference / scale).square().mean().sqrt()) < Z_BOUND


def run_cell(workload: Workload, rows: int, draws: int, seconds: float) -> list[dict[str, Any]]:
    """Yield a result for each way that gives a different plan."""
    torch.manual_seed(0)
    posterior, likelihood = workload.posterior().eval(), workload.likelihood().eval()
    x = torch.randn(rows, *workload.row)
    runs: dict[str, Callable[[], Any]] = {}
    explanations: dict[str, str] = {}
    planned = None
    for name, (settings, forced) in ways(workload, draws).items():
        predict = Predictor(posterior, likelihood, draws, tiles=(rows,), compile=True, **settings)
        with forced():
            explained = _ways_of(predict.explain(x))  # plans without compiling
        if explained in explanations.values():
            continue
        plan = next(iter(predict.executions.by_shape.values()))[0].plan
        if plan.chunk * plan.activation_bytes > predict.settings.memory_budget // 2:
            continue  # not within the memory budget
        predict.warm_up((rows,), example=x)
        prediction = predict(x)
        planned = prediction if planned is None else planned
        if not agree(prediction, planned, same_draws=workload.method is not MeanField):
            raise SystemExit(f"{workload.name}, batch {rows}, {draws} draws: '{name}' predicts something else")
        explanations[name] = explained
        runs[name] = lambda predict=predict: predict(x)
    timings = interleave(runs, seconds, rounds=3)
    best = {clock: min(timings, key=lambda n, clock=clock: getattr(timings[n], clock)) for clock in ("wall", "cpu")}
    lost = min(getattr(timings["plan"], clock) / getattr(timings[best[clock]], clock) for clock in best)
    return [
        {
            "workload": workload.name,
            "batch": rows,
            "draws": draws,
            "way": name,
            "wall_s": timing.wall,
            "cpu_s": timing.cpu,
            **({"best": best["wall"], "to_best": lost, "passed": lost <= ALLOWED} if name == "plan" else {}),
        }
        for name, timing in timings.items()
    ]


def _ways_of(explained: str) -> str:
    """The steps of a plan without their reasons."""
    return "\n".join(line for line in explained.splitlines() if not line.startswith(("because", "precision")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(w.name for w in WORKLOADS))
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--samples", "--draws", dest="samples", default="32,100")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of timing per cell")
    parser.add_argument("--out", type=Path, help="append one JSON line per result to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    here, results = machine(), []
    print(", ".join(f"{k} {v}" for k, v in here.items()))
    for workload in WORKLOADS:
        if not any(workload.name.startswith(p) for p in options.workloads.split(",")):
            continue
        members = [workload.n_samples] if workload.method is DeepEnsemble else map(int, options.samples.split(","))
        for draws in members:
            for rows in map(int, options.batches.split(",")):
                rows_of = run_cell(workload, rows, draws, options.seconds)
                results += rows_of
                plan = rows_of[0]
                verdict = "ok" if plan["passed"] else "MISSED"
                print(f"\n{workload.name}, batch {rows}, {draws} draws: {plan['to_best']:.2f} of the best {verdict}")
                for row in rows_of:
                    print(f"    {row['way']:34s} {row['wall_s'] * 1e3:10.3f} ms", flush=True)
                if options.out is not None:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    with options.out.open("a") as file:
                        for row in rows_of:
                            rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
                            file.write(json.dumps(rounded | {"machine": here}) + "\n")
                torch._dynamo.reset()
                gc.collect()
    plans = [r for r in results if r["way"] == "plan"]
    missed = sum(not r["passed"] for r in plans)
    print(f"\nthe plan is within 15 % of the best way in {len(plans) - missed} of {len(plans)} cells")


if __name__ == "__main__":
    main()
