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
from collections.abc import Callable
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
OTHERS = MS[:4]
Cells = dict[tuple[str, str, int], dict[str, dict[str, Any]]]  # rows by network, method and rows, then by contender


def cells_of(rows: list[dict[str, Any]]) -> Cells:
    """The rows by cell and contender; the last of equal ones counts."""
    cells: Cells = {}
    for row in rows:
        cells.setdefault((row["network"], row["method"], row["rows"]), {})[row["contender"]] = row
    return cells


def to_best(by_name: dict[str, dict[str, Any]]) -> float | None:
    """The best other contender's time over vbdl's. Each is first compared with the loop of its own run."""
    ratios = {name: row["ratio"] for name, row in by_name.items() if "ratio" in row}
    others = [ratios[name] for name in OTHERS if name in ratios]
    return ratios["vbdl"] / max(others) if others and "vbdl" in ratios else None


def report(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of the rows: steady times, then first answers and memory, then what failed."""
    times, firsts = both_tables(rows)
    failed = [
        f"* {network}, {method}, {n}: {name}: {' '.join(row['failed'].split())[:300]}"
        for (network, method, n), by_name in cells_of(rows).items()
        for name, row in by_name.items()
        if "failed" in row and not row["failed"].startswith("NotApplicable")
    ]
    parts = ["Milliseconds, steady:", times, "Seconds to the first answer:", firsts, goals(rows)]
    return "\n\n".join(parts + (["Failed:", "\n".join(failed)] if failed else []))


def both_tables(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Markdown tables of steady times, and of first answers and memory."""
    shown = [name for name in MS if any(row["contender"] == name and "wall_ms" in row for row in rows)]
    compiled = [name for name in ("loop-compiled", "vbdl") if name in shown]
    heads = [f"{name} cold / warm" for name in compiled]
    times = [_row("network", "method", "rows", *shown, "vbdl to best other")]
    firsts = [_row("network", "method", "rows", "loop", *heads, "ready cold / warm", "memory vbdl / vmap")]
    times.append("| --- " * (len(shown) + 4) + "|")
    firsts.append("| --- " * (len(heads) + 6) + "|")
    for (network, method, n), by_name in cells_of(rows).items():
        get = lambda name, key, by_name=by_name: _digits(by_name.get(name, {}).get(key))
        both = lambda name, key, get=get: f"{get(name, f'cold_{key}')} / {get(name, f'warm_{key}')}"
        steady = [get(name, "wall_ms") for name in shown]
        times.append(_row(network, method, str(n), *steady, _digits(to_best(by_name))))
        first = [both(name, "first_s") for name in compiled]
        first += [both("vbdl", "ready_s"), f"{get('vbdl', 'memory')} / {get('vmap', 'memory')}"]
        firsts.append(_row(network, method, str(n), get("loop", "warm_first_s"), *first))
    return "\n".join(times), "\n".join(firsts)


def goals(rows: list[dict[str, Any]]) -> str:
    """How many cells reach each goal of the design, and which do not."""
    cells = cells_of(rows)
    ahead = {cell: ratio for cell, by_name in cells.items() if (ratio := to_best(by_name)) is not None}
    vbdl = {cell: by_name["vbdl"] for cell, by_name in cells.items() if "warm_peak_mb" in by_name.get("vbdl", {})}
    loop = {cell: by_name["loop"] for cell, by_name in cells.items() if "warm_first_s" in by_name.get("loop", {})}
    first = {c: row["cold_first_s"] / loop[c]["warm_first_s"] for c, row in vbdl.items() if c in loop}
    memory = {c: row["memory"] for c, row in vbdl.items() if "memory" in row}
    ready = {c: row["warm_ready_s"] for c, row in vbdl.items()}
    both = {c: (b["vbdl"], b["vbdl-tuned"]) for c, b in cells.items() if "ratio" in b.get("vbdl-tuned", {})}
    tuned = {c: other["ratio"] / default["ratio"] for c, (default, other) in both.items()}
    return "\n".join(
        _goal(*goal)
        for goal in (
            ("At least 0.95 of the best other", ahead, lambda r: r >= 0.95),
            ("At least 1.3 of the best other", ahead, lambda r: r >= 1.3),
            ("At most 1.15 of the time of the tuned", tuned, lambda r: r <= 1.15),
            ("First answer, with an empty cache, at most 2 of the loop's", first, lambda r: r <= 2),
            ("Memory at most 1.2 of the loop's", memory, lambda r: r <= 1.2),
            ("Ready within 3 s with a full cache", ready, lambda r: r < 3),
        )
        if goal[1]
    )


def _goal(words: str, figures: dict[tuple[str, str, int], float], reached: Callable[[float], bool]) -> str:
    missed = {cell: figure for cell, figure in figures.items() if not reached(figure)}
    names = ", ".join(f"{' '.join(map(str, cell))} {_digits(figure)}" for cell, figure in missed.items())
    return f"* {words}: {len(figures) - len(missed)} of {len(figures)} cells" + (f"; not {names}" if missed else "")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


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
