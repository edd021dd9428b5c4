"""Streaming metrics as torchmetrics.Metric objects; torchmetrics is needed only here."""

from typing import TYPE_CHECKING

from vbdl.metrics.streaming import Accumulator

if TYPE_CHECKING:  # torchmetrics need not be installed
    from torchmetrics import Metric


def as_torchmetric(accumulator: Accumulator) -> "Metric":
    """Wrap an accumulator, like Mean(brier_score), CalibrationError() or Rows(auroc), as a torchmetrics.Metric.

    The metric has update, compute, reset, merge_state and forward (which adds a batch and returns its value); if
    torch.distributed runs, compute covers the rows of all processes. It can be copied, pickled and put into a
    MetricCollection. It works on an empty copy of the accumulator. compute returns a float64 scalar; the accumulator's
    other results (an interval, a diagram, parts of a score) are available from `.accumulator`.

    Raises ImportError if torchmetrics is not installed.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> from vbdl.metrics import Mean, as_torchmetric, brier_score
    >>> metric = as_torchmetric(Mean(brier_score))
    >>> metric.update(probs, y)
    >>> round(metric.compute().item(), 3)
    0.54
    """
    try:
        from vbdl.metrics._torchmetric import AccumulatorMetric
    except ImportError as error:
        raise ImportError("as_torchmetric needs torchmetrics: pip install torchmetrics") from error
    return AccumulatorMetric(accumulator)
