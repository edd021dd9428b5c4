"""`benchmarks/networks.py` compares before it times, and prints what it measured. In processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow

WRONG = """
import torch
from contenders import Cell, agreement, loop, reference
from networks import NETWORKS

torch.set_grad_enabled(False)
for method in ("ensemble", "dropout"):
    cell = Cell(NETWORKS["mlp"], method, 2)
    expected, networks = reference(cell), cell.networks()
    print(agreement(cell, loop(cell, networks), expected).split(",")[0])
    for p in networks[-1].parameters():
        p.mul_(1.5)
    try:
        agreement(cell, loop(cell, networks), expected)
    except RuntimeError as error:
        print(str(error).split(" differ")[0])
"""


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cell_is_compared_timed_and_printed(tmp_path):
    out, choice = tmp_path / "out.jsonl", ("--networks", "mlp", "--methods", "ensemble", "--rows", "2")
    run("networks.py", *choice, "--contenders", "batch,vmap,vbdl-uncompiled", "--seconds", "0.1", "--out", str(out))
    rows = {row["contender"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["batch"]["failed"].startswith("NotApplicable")
    for name in ("loop", "vmap", "vbdl-uncompiled"):
        assert rows[name]["agreement"].startswith("same members")
        assert min(rows[name][key] for key in ("wall_ms", "warm_first_s", "warm_peak_mb", "memory")) > 0
    assert "| mlp | ensemble | 2 |" in run("networks.py", "--table", "--out", str(out))


def test_a_contender_that_says_something_else_is_not_timed():
    assert run("-c", WRONG).splitlines() == [
        "same members",
        "mean and spread of the members",
        "statistics",
        "statistics",
    ]
