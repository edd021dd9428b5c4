"""Networks as users have them: vbdl by default settings against what one would have written. CPU, one thread.

    python benchmarks/networks.py [--networks gru,mlp] [--methods dropout] [--rows 1,32] [--contenders loop,vbdl]
                                  [--seconds 8] [--quick] [--out benchmarks/results/networks-cpu.jsonl]
    python benchmarks/networks.py --table          prints the results of the file as Markdown tables, runs nothing

Networks: `zoo/`. Methods: ensembles of five (of the small convolutional network four), dropout, mean-field, and
networks that draw by themselves, 16 draws each. Contenders (`contenders.py`):

    loop             one eager forward pass a draw, as tutorials write it; for mean-field the std kept
    loop-compiled    the same, the forward pass compiled by torch.compile
    batch            dropout: rows repeated for each draw, one forward pass
    vmap             vmap of functional_call over stacked members, over drawn weights or over draws
    vbdl             Predictor(posterior, likelihood, n_samples); it computes the split of uncertainty besides
    vbdl-tuned       the same with tiles=(rows,)
    vbdl-uncompiled  the same with compile=False

A cell is a network, a method and a number of rows. First answer: seconds from the trained networks to the first
prediction, in a new process; for what is compiled once with an empty cache of compiled code, and again with what that
process has left there. Ready: the same until nothing is left to compile. Memory: the largest resident memory of a
process with a full cache over that of the loop's process. Steady time: all contenders in turn in one process, medians
over rounds. Before it, answers are compared: mean and spread of an ensemble's members to 1e-4 relative, and where draws
differ the root mean square of (difference of means) / (its standard error) and the spread. A contender that disagrees,
fails or takes longer than --timeout is a row with the reason. Weights are random; no answer depends on a download.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import speed
from contenders import COMPILED, CONTENDERS, Cell, agreement, reference
from zoo import drawing, images, series, tables, text

NETWORKS = {n.name: n for part in (images, text, tables, series, drawing) for n in part.NETWORKS}
RESULTS = Path(__file__).parent / "results" / "networks-cpu.jsonl"
QUICK = ("mlp", "cnn-96", "gru", "ft-transformer")
CACHE = "TORCHINDUCTOR_CACHE_DIR"

# -- in a process of its own


def worker(task: dict[str, Any]) -> dict[str, Any]:
    """Do the task in this process."""
    torch.set_num_threads(task["threads"])
    torch.set_grad_enabled(False)
    cell = Cell(NETWORKS[task["network"]], task["method"], task["rows"])
    return first(cell, task["contender"]) if task["do"] == "first" else steady(cell, task)


def first(cell: Cell, name: str) -> dict[str, Any]:
    """The seconds to the first answer and until nothing is left to compile, and the peak of resident memory."""
    networks = cell.networks()
    begun = time.perf_counter()
    contender = CONTENDERS[name](cell, networks)
    del networks
    contender.run()
    answered = time.perf_counter() - begun
    contender.settle()
    ready = time.perf_counter() - begun
    contender.run()
    peak = int(next(s.split()[1] for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")))
    return {"first_s": answered, "ready_s": ready, "peak_mb": peak / 1024, "explain": contender.explain()}


def steady(cell: Cell, task: dict[str, Any]) -> dict[str, Any]:
    """The agreement and the time of every contender that agrees, in turn."""
    expected, rows, runs = reference(cell), {}, {}
    for name, cache in task["contenders"].items():
        os.environ[CACHE] = cache
        try:
            contender = CONTENDERS[name](cell, cell.networks())
            contender.run()
            contender.settle()
            rows[name] = {"agreement": agreement(cell, contender, expected)}
        except Exception as error:
            rows[name] = {"failed": f"{type(error).__name__}: {error}"}
        else:
            runs[name] = contender.run
    for name, timing in speed.interleave(runs, task["seconds"], task["rounds"]).items():
        rows[name] |= {"wall_ms": 1e3 * timing.wall, "cpu_ms": 1e3 * timing.cpu, "ratio": timing.ratio}
    return rows


def apart(task: dict[str, Any], cache: str, timeout: float) -> dict[str, Any]:
    """Do a task in a new process; what it returned, or {"failed": reason}."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--worker", json.dumps(task), "--answer", str(answer)]
        environment = {**os.environ, CACHE: cache, "OMP_NUM_THREADS": str(task["threads"])}
        environment.pop("VBDL_COMPILE", None)  # it would change the default settings
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer after {timeout:g} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its compiling processes too
            process.wait()
        if answer.exists():
            return json.loads(answer.read_text())
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return {"failed": (lines or [f"exit status {process.returncode}"])[-1]}


# -- the run


def run_cell(cell: dict[str, Any], names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender of a cell."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        caches = {name: str(Path(folder) / name) for name in names}
        common = {**cell, "threads": options.threads}
        for name in names:
            # what is not compiled has no cache to fill, and runs once
            for kind in ("cold", "warm") if name in COMPILED else ("warm",):
                answer = apart({**common, "do": "first", "contender": name}, caches[name], options.timeout)
                rows[name] |= {k if k in ("failed", "explain") else f"{kind}_{k}": v for k, v in answer.items()}
                if "failed" in answer:
                    break
        timed = {name: caches[name] for name in names if "failed" not in rows[name]}
        if options.seconds > 0 and timed:
            task = {**common, "do": "steady", "contenders": timed, "seconds": options.seconds, "rounds": options.rounds}
            answer = apart(task, folder, 2 * options.timeout)
            for name in timed:
                rows[name] |= {"failed": answer["failed"]} if "failed" in answer else answer[name]
    peak = rows.get("loop", {}).get("warm_peak_mb")
    for row in rows.values():
        if peak and "warm_peak_mb" in row:
            row["memory"] = row["warm_peak_mb"] / peak
    return [{**cell, "contender": name, **row} for name, row in rows.items()]


def commit() -> str:
    """The commit of the checkout, with a plus sign if files differ from it."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent).stdout
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")


# -- for people

MS = ("loop", "loop-compiled", "batch", "vmap", "vbdl", "vbdl-tuned", "vbdl-uncompiled")


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of the rows: steady times, then first answers and memory, then what failed."""
    cells: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:  # the last of equal cells counts
        cells.setdefault((row["network"], row["method"], row["rows"]), {})[row["contender"]] = row
    times = [
        "| network | method | rows | " + " | ".join(MS) + " | vbdl to best other |",
        "| --- " * (len(MS) + 4) + "|",
    ]
    firsts = [
        "| network | method | rows | loop | loop-compiled cold / warm | vbdl cold / warm | ready cold / warm "
        "| uncompiled | memory vbdl / uncompiled / vmap |",
        "| --- " * 9 + "|",
    ]
    failed, ahead = [], []
    for (network, method, n), by_name in cells.items():
        head = f"| {network} | {method} | {n} | "
        get = lambda name, key, by_name=by_name: by_name.get(name, {}).get(key)
        others = [ms for name in MS[:4] if (ms := get(name, "wall_ms")) is not None]
        to_best = min(others) / get("vbdl", "wall_ms") if others and get("vbdl", "wall_ms") else None
        ahead += [] if to_best is None else [to_best]
        times.append(head + " | ".join(_digits(get(name, "wall_ms")) for name in MS) + f" | {_digits(to_best)} |")
        both = lambda name, key, get=get: f"{_digits(get(name, f'cold_{key}'))} / {_digits(get(name, f'warm_{key}'))}"
        columns = [
            _digits(get("loop", "warm_first_s")),
            both("loop-compiled", "first_s"),
            both("vbdl", "first_s"),
            both("vbdl", "ready_s"),
            _digits(get("vbdl-uncompiled", "warm_first_s")),
            " / ".join(_digits(get(name, "memory")) for name in ("vbdl", "vbdl-uncompiled", "vmap")),
        ]
        firsts.append(head + " | ".join(columns) + " |")
        for name, row in by_name.items():
            if "failed" in row and not row["failed"].startswith("NotApplicable"):
                failed.append(f"* {network}, {method}, {n}: {name}: {' '.join(row['failed'].split())[:300]}")
    goal = (
        f"vbdl is at least 0.95 of the best other in {sum(r >= 0.95 for r in ahead)} of {len(ahead)} cells, at least "
        + (f"1.3 in {sum(r >= 1.3 for r in ahead)}.")
    )
    parts = ["Milliseconds, steady:", "\n".join(times), goal, "Seconds to the first answer:", "\n".join(firsts)]
    return "\n\n".join(parts + (["Failed:", "\n".join(failed)] if failed else []))


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--methods", default="ensemble,dropout,mean-field,stochastic")
    parser.add_argument("--rows", default="1,32", help="batch sizes")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="the loop always runs")
    parser.add_argument("--seconds", type=float, default=8.0, help="of steady timing of a cell; 0: first answers only")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)} at one row, for two seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="append a JSON line a result")
    parser.add_argument("--table", action="store_true", help="print the tables of --out, run nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        try:
            answer = worker(json.loads(options.worker))
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        options.answer.write_text(json.dumps(answer))
        return
    if options.table:
        print(report([json.loads(line) for line in options.out.read_text().splitlines()]))
        return
    if options.quick:
        options.networks, options.rows, options.seconds = ",".join(QUICK), "1", 2.0
    torch.set_num_threads(options.threads)
    here, revision = speed.machine(), commit()
    print(", ".join(f"{k} {v}" for k, v in here.items()))
    wanted = options.contenders.split(",")
    results = []
    for name in options.networks.split(","):
        for method in NETWORKS[name].methods:
            for rows in map(int, options.rows.split(",")):
                if method not in options.methods.split(","):
                    continue
                begun = time.perf_counter()
                chosen = [c for c in CONTENDERS if c == "loop" or c in wanted]
                found = run_cell({"network": name, "method": method, "rows": rows}, chosen, options)
                seconds = time.perf_counter() - begun
                for row in found:
                    results.append(row)
                    print(line(row), flush=True)
                    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
                    with options.out.open("a") as file:
                        stamp = {"seconds": round(seconds, 1), "commit": revision, "machine": here}
                        file.write(json.dumps(rounded | stamp) + "\n")
    print("\n" + report(results))


def line(row: dict[str, Any]) -> str:
    """One result for people."""
    head = f"{row['network']:14s} {row['method']:10s} {row['rows']:3d} {row['contender']:15s} "
    if "failed" in row:
        return head + " ".join(row["failed"].split())[:200]
    first = f"first {_digits(row.get('cold_first_s'))} / {_digits(row.get('warm_first_s'))} s"
    ready = f"ready {_digits(row.get('cold_ready_s'))} / {_digits(row.get('warm_ready_s'))} s"
    memory = f"{row['warm_peak_mb']:.0f} MB"
    time = f"{_digits(row['wall_ms'])} ms, {_digits(row['ratio'])}x; {row['agreement']}" if "wall_ms" in row else ""
    return f"{head}{first}, {ready}, {memory}; {time}"


if __name__ == "__main__":
    main()
