"""Run all tests and benchmarks that need a GPU, in one command and under ten minutes.

    make gpu            or: python benchmarks/gpu.py [--out DIR] [--seconds 570]

The sections run in order of importance, each in its own process with its own time limit, so that an interrupted run
has the most important results:

    tests         tests marked gpu                                               tests.txt
    prepare       every predictor compiled and compared                          prepare.txt
    once          every kernel of the benchmark compiled and compared
    constants     the device's own for vbdl_kernels.regime                       constants.txt
    kernels       P1 to P9 and the regime map where it matters                   kernels-<card>.jsonl
    predictors    the workloads of benchmarks/speed.py, Predictor against loop   predictors-<card>.jsonl
    grid          the regime map on all shapes                                   grid-<card>.jsonl

The first three sections run side by side; timed sections run alone. DIR is $OUT, or gpu-results. Each row is a JSON
line, written when it is measured, and table.txt has all rows. The time limit holds even if a child process hangs. Exits
with 1 if a section failed. --check runs without a GPU whatever can run there, to find errors beforehand.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 570  # seconds, for all of it
LIMITS = {"tests": 150, "prepare": 150, "once": 150, "constants": 60, "kernels": 150, "predictors": 130, "grid": 300}
TOGETHER = ("tests", "prepare", "once")  # sections without timing
RECORDED = ("tests", "prepare", "constants")  # sections whose output is recorded; the others write their rows
_GRACE = 5  # seconds between SIGTERM and SIGKILL of a child


def run(command: list[str], seconds: float, record: Path | None = None) -> int:
    """Run a command and return its exit status, 124 after a timeout; print and record its output."""
    print("$", " ".join(command), f"({seconds:.0f} s)", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the child's own processes end with it
    )
    kept = record.open("w") if record is not None else None

    def follow() -> None:
        for line in process.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            if kept is not None:
                kept.write(line)
                kept.flush()

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    status = None
    try:
        status = process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", flush=True)
    finally:
        if status is None:
            _end(process)
    reader.join(1)  # a grandchild that has left the group may hold the pipe: do not wait for it
    return 124 if status is None else status


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def commands(out: Path, check: bool) -> dict[str, list[str]]:
    script = lambda name: [sys.executable, str(ROOT / "benchmarks" / name)]
    # pyproject.toml names plugins that this machine may not have
    options = ["-o", "addopts=--import-mode=importlib", "-W", "ignore::pytest.PytestConfigWarning"]
    # only the folders with GPU tests: others import packages that this machine may not have
    tests = [sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu", "-q", "--durations=10", *options]
    if not check and importlib.util.find_spec("xdist"):  # most of it is compiling
        tests += ["-p", "no:benchmark"]  # its warning about xdist would be an error
        tests += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "worksteal"]
    if check:
        return {
            "tests": [*tests, "--collect-only"],
            "constants": [sys.executable, "-m", "vbdl_kernels.measured", "--check"],
            "kernels": [*script("kernels.py"), "--check"],
            "predictors": [*script("predictors.py"), "--check"],
            "grid": [*script("kernels.py"), "--check", "--grid"],
        }
    to = ["--out", str(out.resolve())]
    return {
        "tests": tests,
        "prepare": [*script("predictors.py"), "--prepare"],
        "once": [*script("kernels.py"), "--once"],
        "constants": [sys.executable, "-m", "vbdl_kernels.measured"],
        "kernels": [*script("kernels.py"), *to],
        "predictors": [*script("predictors.py"), *to],
        "grid": [*script("kernels.py"), *to, "--grid"],
    }


def table(rows: list[dict]) -> str:
    """Format the timed rows as a text table, in the order in which they were measured."""
    lines = [f"{'goal':10s} {'case':52s} {'provider':32s} {'ms':>10s} {'speed':>7s}"]
    hidden = {"goal", "provider", "ms", "compile_s", "times_the_first"}
    for row in rows:
        shown = {k: v for k, v in row.items() if k not in hidden and not k.endswith("_per_s") and "share" not in k}
        case = " ".join(f"{k}={v}" for k, v in shown.items())
        if "ms" in row:
            speed = row.get("times_the_first", float("nan"))
            lines.append(f"{row['goal']:10s} {case:52s} {row['provider']:32s} {row['ms']:10.4f} {speed:6.2f}x")
        else:
            lines.append(f"{row.get('goal', ''):10s} {case} {row.get('provider', '')}".rstrip())
    return "\n".join(lines) + "\n"


def rows_of(out: Path) -> list[dict]:
    """The complete lines of all results; the last line of a file may be truncated."""
    rows = []
    for part in ("kernels", "predictors", "grid"):
        for path in sorted(out.glob(f"{part}-*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"))
    parser.add_argument("--check", action="store_true", help="without a GPU, collect the tests and run the rest tiny")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="time limit of the whole run in seconds")
    options = parser.parse_args()
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    statuses: dict[str, int] = {}

    def section(name: str, command: list[str]) -> None:
        left = options.seconds - (time.perf_counter() - started) - 2 * _GRACE
        if left < 10:
            print(f"no time left for {name}", flush=True)
            statuses[name] = 124
            return
        statuses[name] = run(
            command, min(left, LIMITS[name]), options.out / f"{name}.txt" if name in RECORDED else None
        )

    all_of_them = commands(options.out, options.check)
    first = [threading.Thread(target=section, args=(n, c)) for n, c in all_of_them.items() if n in TOGETHER]
    for thread in first:
        thread.start()
    for thread in first:
        thread.join()
    for name, command in all_of_them.items():
        if name not in TOGETHER:
            section(name, command)
            # after each section, so that an interrupted run has a table
            (options.out / "table.txt").write_text(table(rows_of(options.out)))
    statuses_text = ", ".join(f"{n} {'ok' if s == 0 else f'status {s}'}" for n, s in statuses.items())
    print(f"{time.perf_counter() - started:.0f} s: {statuses_text}; results in {options.out}")
    raise SystemExit(any(s != 0 for n, s in statuses.items() if not (n == "grid" and s == 124)))


if __name__ == "__main__":
    main()
