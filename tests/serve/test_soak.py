"""Good, bad, slow and impatient clients and reloads, for as long as VBDL_SOAK says: 1,800 seconds unless it is set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("VBDL_SOAK", "1800"))
CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 1.5 + 600)
def test_a_soak(tmp_path):
    command = [sys.executable, str(CHAOS), "--only", "load", "--seconds", str(SECONDS)]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[0])
    assert result["wrong"] == result["other"] == result["bad_5xx"] == result["tracebacks"] == 0, result
    assert result["answered"] > SECONDS and result["bad"] > SECONDS and result["slow_cut"] > 10, result
    assert result["reloads"] >= 1 and set(result["impatient"]) <= {"200", "503", "504"}, result
    # a connection that is idle when its worker is replaced is closed: at most every client's at every worker
    assert result["lost"] <= 8 * result["reloads"], result
    assert result["memory_growth_mib"] < 30, result
    assert result["p99_ms"] < 2 * result["p99_alone_ms"], result
