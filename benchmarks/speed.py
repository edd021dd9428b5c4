"""Compare vbdl's predictions on one CPU thread with hand-written code and with other libraries.

    python benchmarks/speed.py [--workloads W1,W3] [--batches 1,32,256] [--contenders loop,vbdl] [--quick]
                               [--seconds 8] [--out benchmarks/results/speed-cpu.jsonl] [--check]

Workloads: `workloads.py`; peers: `peers.py`. Contenders, each ending in softmax (or not) and the mean over draws:

    loop             the tutorial loop: one eager forward pass a draw
    loop-kept-std    the same for mean-field, the std kept and each draw written in one operation
    loop-compiled    the same loop, the forward pass compiled
    vmap             vmap of functional_call; vmap-compiled: the whole of it compiled
    vbdl             Predictor, tile = batch, warmed up; it computes the split and the standard errors besides
    vbdl-...         joint: weights drawn; bfloat16: the network in it
    <peer>           by its own interface, as its documentation says

Before anything is timed, outputs are compared on up to 32 rows: "same draws" with a plain loop over the very draws of
the seed, float32 to 2e-5 of a probability and bfloat16 to 1e-2; where the draws differ, "statistics": the root mean
square of (difference of means) / (its standard error) below 2.5, and the spread of the draws within three of its own
standard errors. The loop's line says how the draws of vbdl's seed compare with the loop's. A contender that does not
agree is not timed. All contenders run in turn in every round; the ratio to the loop is formed inside a round, and the
median over rounds is reported for wall and for CPU time; the lower of the two is judged. Compile time (warm-up, first
call) is its own column. Where a required ratio is missed, the last column says what bounds the cell on this machine, as
measured (operations, bytes or the overhead of a call), and what fraction of that bound was reached.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import peers
import workloads
from workloads import WORKLOADS, Workload

from vbdl import DeepEnsemble, Gaussian, MeanField, Predictor
from vbdl.calling.stacking import call, select

BATCHES = (1, 32, 256)
CHECKED_ROWS = 32
REFERENCE_DRAWS = 300  # draws of the loop, if only statistics can be compared
SAME = {"float32": 2e-5, "bfloat16": 1e-2}  # largest difference of a mean probability (or mean) of the same draws
Z_BOUND = 2.5
ROUND_SECONDS = 2e-2  # seconds per round of contenders with shorter calls


class NotAvailable(Exception):
    """Raised with a reason if a contender is not available."""


@dataclass
class Contender:
    """A way to predict: built for one batch, then called."""

    name: str
    build: Callable[[], Callable[[], Any]]
    # what `build` gave -> mean over draws and their std, of the first rows
    look: Callable[[Callable[[], Any]], tuple[Tensor, Tensor | None]]
    variant: str = ""  # of vbdl: which required ratios it is judged by


@dataclass
class Timing:
    """The median times over rounds; ratios are formed inside a round."""

    wall: float
    cpu: float
    wall_ratio: float
    cpu_ratio: float

    @property
    def ratio(self) -> float:
        return min(self.wall_ratio, self.cpu_ratio)


# -- contenders


class Cell:
    """One workload at one batch size."""

    def __init__(self, workload: Workload, rows: int):
        torch.manual_seed(0)
        self.workload, self.rows = workload, rows
        self.posterior = workload.posterior().eval()
        self.likelihood = workload.likelihood().eval()
        self.x = torch.randn(rows, *workload.row)
        self.is_ensemble = isinstance(self.posterior, DeepEnsemble)

    def end(self, outputs: Tensor) -> Tensor:
        """(samples, batch, outputs) -> (batch, outputs), what tutorials end with."""
        return self.each(outputs).mean(0)

    def each(self, outputs: Tensor) -> Tensor:
        return outputs if isinstance(self.likelihood, Gaussian) else outputs.softmax(-1)

    def contenders(self) -> list[Contender]:
        q, x, n, w = self.posterior, self.x, self.workload.n_samples, self.workload
        contenders = [self._loop("loop", lambda: workloads.tutorial(q, x, n))]
        if isinstance(q, MeanField):
            contenders.append(self._loop("loop-kept-std", lambda: workloads.tutorial_kept_std(q, x, n)))
        contenders.append(self._loop("loop-compiled", lambda: workloads.tutorial_compiled(q, x, n)))
        vmapped = lambda: workloads.mapped(q, x, n, w.activations)
        contenders.append(self._loop("vmap", vmapped))
        contenders.append(self._loop("vmap-compiled", vmapped, compiled=True))
        joints = ("", " joint") if isinstance(q, MeanField) else ("",)
        for dtype in ("float32", "bfloat16"):
            contenders += [self._vbdl(dtype + joint) for joint in joints]
        for name, samples in peers.contenders(q, x, n).items():
            contenders.append(self._loop(name, samples))
        return contenders

    def _loop(self, name: str, make: Callable[[], workloads.Samples], compiled: bool = False) -> Contender:
        def build() -> Callable[[], Any]:
            samples = make()
            whole = lambda: self.end(samples())
            return torch.compile(whole, dynamic=False) if compiled else whole

        def look(run: Callable[[], Any]) -> tuple[Tensor, Tensor | None]:
            if compiled:
                return run()[:CHECKED_ROWS], None
            each = self.each(make()())[:, :CHECKED_ROWS]
            return each.mean(0), each.std(0)

        return Contender(name, build, look)

    def _vbdl(self, variant: str) -> Contender:
        settings: dict[str, Any] = {"tiles": (self.rows,)}
        if "bfloat16" in variant:
            settings["autocast"] = torch.bfloat16
        if "joint" in variant:
            settings["joint"] = True

        def build() -> Callable[[], Any]:
            try:
                predict = Predictor(self.posterior, self.likelihood, self.workload.n_samples, **settings)
            except TypeError as error:
                if "unexpected keyword" not in str(error):
                    raise
                raise NotAvailable(f"this vbdl has no {error.args[0].split()[-1]}") from error
            predict.warm_up((self.rows,), example=self.x)
            return lambda: predict(self.x)

        def look(run: Callable[[], Any]) -> tuple[Tensor, Tensor | None]:
            p = run()
            spread = p.standard_error * self.workload.n_samples**0.5
            return p.mean[:CHECKED_ROWS], spread[:CHECKED_ROWS]

        name = "-".join(["vbdl", *(part for part in variant.split()[::-1] if part != "float32")])
        return Contender(name, build, look, variant)

    # -- agreement

    def same_draws(self) -> tuple[Tensor, Tensor]:
        """The mean and std over the draws of the seed, computed one after the other in plain torch."""
        q, n = self.posterior, self.workload.n_samples
        q.prepare(self.x)
        outputs = []
        for start in range(0, n, 10):
            state = q.draws(torch.arange(start, min(start + 10, n)), 0) if not self.is_ensemble else None
            for s in range(start, min(start + 10, n)):
                one = q.member(s) if state is None else select(state, s - start)
                outputs.append(call(q.module, one, self.x[:CHECKED_ROWS]))
        each = self.each(torch.stack(outputs))
        return each.mean(0), each.std(0)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and std over many draws of the loop."""
        outputs = workloads.tutorial(self.posterior, self.x[:CHECKED_ROWS], REFERENCE_DRAWS)()
        each = self.each(outputs)
        return each.mean(0), each.std(0)

    def agreement(self, contender: Contender, answer: tuple[Tensor, Tensor | None]) -> str:
        """How the contender was compared, and how near it came. Raises RuntimeError if it does not agree."""
        mean, spread = answer
        if not bool(mean.isfinite().all()):
            raise RuntimeError("its output is not finite")
        if contender.name == "loop" and not self.is_ensemble:
            mean, spread = self._same  # of the seed's draws: that they are of the loop's distribution
        if contender.variant or self.is_ensemble:
            tolerance = SAME["bfloat16" if "bfloat16" in contender.variant else "float32"]
            far = float((mean - self._same[0]).abs().max())
            if far <= tolerance:
                return f"same draws, {far:.0e}"
            if self.is_ensemble or not isinstance(self.posterior, MeanField) or "joint" in contender.variant:
                raise RuntimeError(f"the same draws differ by {far:.2g}, allowed {tolerance:g}")
        reference, reference_spread = self._statistics
        n = self.workload.n_samples
        error = reference_spread.clamp_min(1e-6) * (1 / n + 1 / REFERENCE_DRAWS) ** 0.5
        z = float(((mean - reference) / error).square().mean().sqrt())
        off = 0.0 if spread is None else float((spread / reference_spread.clamp_min(1e-9)).log().median().exp()) - 1
        noise = ((1 / n + 1 / REFERENCE_DRAWS) / 2) ** 0.5  # of the spread of so few draws, relative
        if z > Z_BOUND or abs(off) > 3 * noise:
            raise RuntimeError(f"statistics differ: z {z:.1f}, spread of the draws off by {off:.0%}")
        return f"statistics, z {z:.1f}" + ("" if spread is None else f", spread {off:+.0%}")

    @property
    def _same(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_same_draws"):
            self._same_draws = self.same_draws()
        return self._same_draws

    @property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "_reference"):
            self._reference = self.statistics()
        return self._reference


# -- timing


def interleave(runs: dict[str, Callable[[], Any]], seconds: float, rounds: int) -> dict[str, Timing]:
    """Time every contender once a round; ratios are relative to the first."""
    repeats = {}
    for name, run in runs.items():
        run()
        begun = time.perf_counter()
        run()
        # short calls are repeated, so that the first, whose weights the others drove out of the caches, count little
        repeats[name] = max(1, min(2000, int(ROUND_SECONDS / (time.perf_counter() - begun))))
    walls: dict[str, list[float]] = {name: [] for name in runs}
    cpus: dict[str, list[float]] = {name: [] for name in runs}
    first = next(iter(runs))
    end = time.perf_counter() + seconds
    while len(walls[first]) < rounds or time.perf_counter() < end:
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                run()
            walls[name].append((time.perf_counter() - wall) / repeats[name])
            cpus[name].append((time.process_time() - cpu) / repeats[name])
    middle = statistics.median
    ratio = lambda times, name: middle(a / b for a, b in zip(times[first], times[name], strict=True))
    return {n: Timing(middle(walls[n]), middle(cpus[n]), ratio(walls, n), ratio(cpus, n)) for n in runs}


class Bounds:
    """The peak rates of this machine on one thread, measured on first use."""

    def __init__(self) -> None:
        self._measured: dict[Any, float] = {}

    def _once(self, key: Any, measure: Callable[[], float]) -> float:
        if key not in self._measured:
            self._measured[key] = measure()
        return self._measured[key]

    def operations(self, dtype: torch.dtype) -> float:
        """The multiplications and additions per second of a large matrix product."""

        def measure() -> float:
            a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
            return 2 * 1024**3 / _best(lambda: torch.nn.functional.linear(a, b))

        return self._once(dtype, measure)

    def bytes(self, size: float) -> float:
        """The bytes per second that a sum over this much memory reads, caches included."""
        size = int(min(max(size, 2**16), 2**28))

        def measure() -> float:
            a = torch.randn(size // 4)
            return size / _best(lambda: a.sum())

        return self._once(size.bit_length(), measure)

    def overhead(self) -> float:
        """The seconds of a call of the smallest possible predictor."""

        def measure() -> float:
            predict = Predictor(DeepEnsemble(nn.Linear(1, 1), n_members=2), Gaussian(), tiles=(1,), compile=True)
            x = torch.zeros(1, 1)
            predict.warm_up((1,), example=x)
            return _best(lambda: predict(x), repeats=50)

        return self._once("overhead", measure)

    def of(self, workload: Workload, rows: int, variant: str) -> tuple[str, float]:
        """The bound of a call and its least seconds, for the way to compute it with the lowest bound."""
        dtype = torch.bfloat16 if "bfloat16" in variant else torch.float32
        ways = []
        for operations, moved in workload.least(rows, variant):
            times = {
                "operations": operations / self.operations(dtype),
                "bytes": moved / self.bytes(moved),
                "overhead": self.overhead(),
            }
            ways.append(max(times.items(), key=lambda item: item[1]))
        return min(ways, key=lambda item: item[1])


def _best(run: Callable[[], Any], repeats: int = 3) -> float:
    """The least seconds of eleven calls, so that other load on the machine does not raise the bound."""
    run()
    taken = []
    for _ in range(11):
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        taken.append((time.perf_counter() - begun) / repeats)
    return min(taken)


# -- the run


def machine() -> dict[str, Any]:
    """The processor, whether it computes in bfloat16, versions and date."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        name = f"{fields.get('model name', name)} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return {
        "cpu": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bool(torch.cpu._is_avx512_bf16_supported()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "peers": peers.versions(),
    }


def run_cell(cell: Cell, wanted: Callable[[str], bool], seconds: float, rounds: int, bounds: Bounds) -> list[dict]:
    """Yield a result for each contender of a cell: timed, not available, or wrong."""
    results, runs = [], {}
    torch._dynamo.reset()
    for contender in cell.contenders():
        if contender.name != "loop" and not wanted(contender.name):
            continue
        row: dict[str, Any] = {
            "workload": cell.workload.name,
            "batch": cell.rows,
            "contender": contender.name,
            "required": cell.workload.required.get(contender.variant, {}).get(cell.rows),
        }
        results.append(row)
        begun = time.perf_counter()
        try:
            run = contender.build()
            run()
            row["first_call_s"] = time.perf_counter() - begun
            row["agreement"] = cell.agreement(contender, contender.look(run))
        except NotAvailable as error:
            row["failed"] = f"not available: {error}"
        except Exception as error:
            if contender.name == "loop":
                raise
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            row["failed"] = f"wrong or broken: {reason}"
        else:
            runs[contender.name] = run
            row["variant"] = contender.variant
    timings = interleave(runs, seconds, rounds) if seconds > 0 else {}
    for row in results:
        if (timing := timings.get(row["contender"])) is None:
            continue
        row |= {"wall_s": timing.wall, "cpu_s": timing.cpu, "wall_ratio": timing.wall_ratio}
        row |= {"cpu_ratio": timing.cpu_ratio, "ratio": timing.ratio}
        if row["required"] is not None:
            row["passed"] = timing.ratio >= row["required"]
            if not row["passed"]:
                what, least = bounds.of(cell.workload, cell.rows, row["variant"])
                row |= {"bound": what, "bound_s": least, "bound_reached": least / min(timing.wall, timing.cpu)}
    ahead(results)
    del runs
    gc.collect()
    return results


def ahead(results: list[dict]) -> None:
    """Add to the plain vbdl line its speed relative to the best contender that is not vbdl."""
    others = {r["contender"]: r["wall_s"] for r in results if "wall_s" in r and not r["contender"].startswith("vbdl")}
    for row in results:
        if row["contender"] == "vbdl" and "wall_s" in row:
            best = min(others, key=others.__getitem__)
            row |= {"best_other": best, "ahead_of_best_other": others[best] / row["wall_s"]}


HEAD = (
    f"{'contender':24s} {'wall':>10s} {'CPU':>10s} {'ratio':>7s} {'(CPU)':>7s} {'required':>8s} {'':6s} "
    f"{'first call':>10s}  agreement; what bounds a missed cell"
)


def line(row: dict) -> str:
    """One result as a line of text."""
    if "failed" in row:
        return f"{row['contender']:24s} {row['failed']}"
    if "wall_s" not in row:
        return f"{row['contender']:24s} {row['agreement']}"
    required = "" if row["required"] is None else f"{row['required']:g}x"
    verdict = "" if row["required"] is None else "ok" if row["passed"] else "MISSED"
    note = row["agreement"]
    if "best_other" in row:
        note += f"; {row['ahead_of_best_other']:.2f}x the best other, {row['best_other']}"
    if "bound" in row:
        note += f"; bound by {row['bound']}, {_time(row['bound_s'])}: {row['bound_reached']:.0%} of it reached"
    return (
        f"{row['contender']:24s} {_time(row['wall_s']):>10s} {_time(row['cpu_s']):>10s} {row['wall_ratio']:6.2f}x "
        f"{row['cpu_ratio']:6.2f}x {required:>8s} {verdict:6s} {row['first_call_s']:8.1f} s  {note}"
    )


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [w.name for w in WORKLOADS]
    parser.add_argument("--workloads", default=",".join(names), help="names or their beginnings, e.g. W1,W4-tiny")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--contenders", default="", help="beginnings of names (default: all); the loop always runs")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of timing per cell")
    parser.add_argument("--rounds", type=int, default=5, help="least number of rounds")
    parser.add_argument("--quick", action="store_true", help="run only loop and vbdl, 2 seconds and 3 rounds per cell")
    parser.add_argument("--check", action="store_true", help="compare outputs without timing")
    parser.add_argument("--emulated", action="store_true", help="run bfloat16 even if the processor emulates it")
    parser.add_argument("--out", type=Path, help="append one JSON line per result to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    prefixes = [p for p in ("loop,vbdl" if options.quick else options.contenders).split(",") if p]
    if options.quick:
        options.seconds, options.rounds = 2.0, 3
        wanted = lambda name: name == "loop" or name.startswith("vbdl")
    else:
        wanted = lambda name: not prefixes or any(name.startswith(p) for p in prefixes)
    in_bfloat16 = options.emulated or bool(torch.cpu._is_avx512_bf16_supported())
    asked = lambda name: wanted(name) and (in_bfloat16 or "bfloat16" not in name)
    chosen = [w for w in WORKLOADS if any(w.name.startswith(p) for p in options.workloads.split(","))]
    if not chosen:
        raise SystemExit(f"no workload is called {options.workloads}; there are {', '.join(names)}")
    here, bounds, missed = machine(), Bounds(), []
    print(", ".join(f"{k} {v}" for k, v in here.items()))
    if not here["bfloat16"]:
        print("skipped: bfloat16: this processor has no instructions for it, its times would say nothing (--emulated)")
    for name, reason in peers.absent().items():
        print(f"skipped: {name}: {reason}")
    for workload in chosen:
        for rows in map(int, options.batches.split(",")):
            print(f"\n{workload.name}: {workload.title}; batch {rows}\n{HEAD}")
            seconds = 0.0 if options.check else options.seconds
            for row in run_cell(Cell(workload, rows), asked, seconds, options.rounds, bounds):
                print(line(row), flush=True)
                missed += [row] if row.get("passed") is False else []
                if options.out is not None and "wall_s" in row:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
                    with options.out.open("a") as file:
                        file.write(json.dumps(rounded | {"machine": here}) + "\n")
    if not options.check:
        print(f"\n{len(missed)} required ratio(s) missed")


if __name__ == "__main__":
    main()
