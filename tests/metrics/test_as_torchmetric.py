import importlib.util

import pytest
import torch

from vbdl import metrics
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
    with pytest.raises(ValueError, match="no rows yet"):
        metric.compute()
