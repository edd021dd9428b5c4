"""Everything that needs a GPU, in one command and under ten minutes: tests, then benchmarks.

    make gpu            or: python benchmarks/gpu.py [--out DIR]

Writes DIR/tests.txt, DIR/kernels-<card>.jsonl (a line a row, the machine first) and DIR/kernels.txt (a table). DIR is
$OUT, or gpu-results. Exits with 1 if a test fails, after the benchmarks have run all the same. With --check it runs
without a GPU what can be run there, to know beforehand that nothing in it is broken.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 570  # seconds, for all of it


def run(command: list[str], seconds: float, record: Path | None = None) -> int:
    """The exit status; the output goes on to the terminal and into the record."""
    print("$", " ".join(command), flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout or ():
            sys.stdout.write(line)
            lines.append(line)
            if time.perf_counter() - started > seconds:
                process.terminate()
                lines.append(f"stopped after {seconds:.0f} s\n")
                break
    if record is not None:
        record.write_text("".join(lines))
    return process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--check", action="store_true", help="without a GPU: collect the tests, run the providers tiny")
    given = parser.parse_args()
    started = time.perf_counter()
    benchmarks = [sys.executable, str(ROOT / "benchmarks" / "kernels.py")]
    # the options of pyproject.toml name plugins that a machine set up for this alone may not have
    options = ["-o", "addopts=--import-mode=importlib", "-W", "ignore::pytest.PytestConfigWarning"]
    pytest = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "--durations=10", *options]
    if given.check:
        failed = run([*pytest, "--collect-only"], LIMIT) or run([*benchmarks, "--check"], LIMIT)
        raise SystemExit(failed)
    given.out.mkdir(parents=True, exist_ok=True)
    failed = run(pytest, 240, given.out / "tests.txt")
    left = LIMIT - (time.perf_counter() - started)
    # a part of the benchmarks is not cut short: they stop between two, so leave the longest its time
    run([*benchmarks, "--out", str(given.out.resolve()), "--seconds", f"{left - 90:.0f}"], left)
    print(f"{time.perf_counter() - started:.0f} s; results in {given.out}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
