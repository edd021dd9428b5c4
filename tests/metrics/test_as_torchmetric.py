import importlib.util
import pickle
import socket
import subprocess
import sys

import pytest
import torch

from vbdl import metrics
from vbdl.metrics import brier_score
from vbdl.metrics.as_torchmetric import as_torchmetric

_ABSENT = importlib.util.find_spec("torchmetrics") is None


@pytest.mark.skipif(not _ABSENT, reason="torchmetrics is installed")
def test_says_what_to_install():
    with pytest.raises(ImportError, match="pip install torchmetrics"):
        as_torchmetric(metrics.CalibrationError())


@pytest.mark.skipif(_ABSENT, reason="needs torchmetrics, which vbdl does not")
@pytest.mark.parametrize(
    "accumulator",
    [
        metrics.CalibrationError(10),
        metrics.Mean(metrics.brier_score),
        metrics.Rows(metrics.ece),
        metrics.BrierDecomposition(),
    ],
)
def test_is_the_accumulator(accumulator):
    probs = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    y = torch.arange(60) % 3
    metric, other = as_torchmetric(accumulator), as_torchmetric(accumulator)
    metric.update(probs[:20], y[:20])
    batch = metric(probs[20:40], y[20:40])
    other.update(probs[40:], y[40:])
    metric.merge_state(other)
    accumulator.update(probs, y)
    assert float(metric.compute()) == pytest.approx(float(accumulator.compute()), rel=1e-12)
    accumulator.reset()
    accumulator.update(probs[20:40], y[20:40])
    assert float(batch) == pytest.approx(float(accumulator.compute()), rel=1e-12)
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ValueError, match="no rows yet"):
        metric.compute()


@pytest.mark.skipif(_ABSENT, reason="needs torchmetrics, which vbdl does not")
def test_lives_in_a_collection_and_in_a_pickle():
    import torchmetrics

    probs = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    y = torch.arange(60) % 3
    wanted = {"ece": metrics.ece(probs, y), "brier": float(metrics.brier_score(probs, y).mean())}
    members = {"ece": as_torchmetric(metrics.CalibrationError()), "brier": as_torchmetric(metrics.Mean(brier_score))}
    collection = torchmetrics.MetricCollection(members)
    for batch in (slice(0, 13), slice(13, 60)):
        collection.update(probs[batch], y[batch])
    for one in (collection, pickle.loads(pickle.dumps(collection)), collection.clone()):
        assert {name: float(value) for name, value in one.compute().items()} == pytest.approx(wanted, rel=1e-12)
    collection.reset()
    collection.update(probs, y)
    assert float(collection.compute()["ece"]) == pytest.approx(wanted["ece"], rel=1e-12)


_TWO_PROCESSES = """
import sys, torch
from vbdl import metrics
from vbdl.metrics.as_torchmetric import as_torchmetric
rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
probs = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
y = torch.arange(60) % 3
mine = slice(0, 17) if rank == 0 else slice(17, 60)
metric = as_torchmetric(metrics.CalibrationError())
metric.update(probs[mine], y[mine])
print(repr(float(metric.compute()) - metrics.ece(probs, y)))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(_ABSENT, reason="needs torchmetrics, which vbdl does not")
def test_two_processes_compute_the_whole():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _TWO_PROCESSES]
    ranks = [subprocess.Popen([*command, str(rank), str(port)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    for rank in ranks:
        out, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0 and abs(float(out)) < 1e-15
