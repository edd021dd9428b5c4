"""The streaming metrics for people whose training loop speaks torchmetrics, which need not be installed otherwise."""

from typing import Any

from vbdl.metrics.streaming import Accumulator


def as_torchmetric(accumulator: Accumulator) -> Any:  # a torchmetrics.Metric, which need not be installed
    """A torchmetrics.Metric around an accumulator: Mean(brier_score), CalibrationError(), Rows(auroc), ...

    update, compute, reset, forward (the value of the batch, which is added too), merge_state, and all processes
    together in compute where torch.distributed runs. It can be copied, pickled and put into a MetricCollection. The
    accumulator given is copied, and starts empty. compute returns a float64 scalar; what else an accumulator knows (an
    interval, a diagram, parts of a score) is asked of `.accumulator`.

    ImportError when torchmetrics is not installed.
    """
    try:
        from vbdl.metrics._torchmetric import AccumulatorMetric
    except ImportError as error:
        raise ImportError("as_torchmetric needs torchmetrics: pip install torchmetrics") from error
    return AccumulatorMetric(accumulator)
