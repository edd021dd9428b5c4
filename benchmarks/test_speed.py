"""Time the workloads of `benchmarks/speed.py` with pytest-benchmark, after comparing their outputs.

pytest benchmarks/test_speed.py --benchmark-enable [-k "W1 and 32"] [--benchmark-group-by=group]
pytest benchmarks/test_speed.py                    each once, compared and not timed
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import speed
from workloads import WORKLOADS

CONTENDERS = ("loop", "vmap", "vbdl")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def cells():
    """Cells by workload and batch, kept while their contenders are timed, so that the reference is computed once."""
    return {}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_speed(benchmark, cells, workload, rows, contender):
    cell = cells.setdefault((workload.name, rows), speed.Cell(workload, rows))
    chosen = next(c for c in cell.contenders() if c.name == contender)
    run = chosen.build()
    benchmark.extra_info["agreement"] = cell.agreement(chosen, chosen.look(run))  # raises where it does not
    benchmark.group = f"{workload.name}, batch {rows}"
    benchmark(run)
