"""`make gpu` where there is none: its limit holds, its rows survive a cut, and all of it that can run does."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

gpu = importlib.import_module("gpu")


@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(60)",  # says nothing
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",  # and will not go
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
    ],
    ids=["silent", "stubborn", "with a child"],
)
def test_the_limit_holds_whatever_a_child_does(code, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_GRACE", 0.5)
    begun = time.perf_counter()
    assert gpu.run([sys.executable, "-c", code], 0.7, tmp_path / "said.txt") == 124
    assert time.perf_counter() - begun < 5


def test_what_a_child_says_is_kept_as_it_comes(tmp_path, capsys):
    record = tmp_path / "said.txt"
    code = "import time; print('first', flush=True); time.sleep(60)"
    assert gpu.run([sys.executable, "-c", code], 1.0, record) == 124
    assert record.read_text() == "first\n" and "first" in capsys.readouterr().out
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 10) == 3


def test_a_cut_run_leaves_its_rows(tmp_path):
    row = {"goal": "P2-P4", "batch": 16, "provider": "fused", "ms": 0.5, "times_the_first": 2.0, "weights_per_s": 1e12}
    (tmp_path / "kernels-card.jsonl").write_text(json.dumps(row) + '\n{"goal": "P2-P4", "bat')
    rows = gpu.rows_of(tmp_path)
    assert rows == [row]
    assert gpu.table(rows).splitlines()[1].split() == ["P2-P4", "batch=16", "fused", "0.5000", "2.00x"]


def test_the_sections_fit_the_limit():
    sections = list(gpu.commands(Path("out"), check=False))
    assert sections == list(gpu.LIMITS) and gpu.LIMIT < 600
    together = max(gpu.LIMITS[name] for name in gpu.TOGETHER)
    alone = [name for name in sections if name not in gpu.TOGETHER and name != "grid"]  # which takes what is left
    assert together + sum(gpu.LIMITS[name] for name in alone) + 2 * gpu._GRACE * (len(alone) + 1) <= gpu.LIMIT


@pytest.mark.slow  # half a minute; what it starts is tested where it is, and a GPU's own run shows the rest
def test_everything_that_needs_no_gpu_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--check", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "tests ok, constants ok, kernels ok, predictors ok, grid ok" in done.stdout
    assert "predictors agree with the CPU's" in done.stdout
