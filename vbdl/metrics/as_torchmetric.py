"""The streaming metrics for people whose training loop speaks torchmetrics, which need not be installed otherwise."""

import copy
from typing import Any

import torch


def as_torchmetric(accumulator: Any) -> Any:
    """A torchmetrics.Metric around an accumulator: Mean(brier_score), CalibrationError(), Rows(auroc), ...

    update, compute, reset, forward (the value of the batch, which is added too), merge_state, and all processes
    together in compute where torch.distributed runs. The accumulator given is copied, and starts empty. compute
    returns a float64 scalar; what else an accumulator knows (an interval, a diagram, parts of a score) is asked of
    `.accumulator`.

    ImportError when torchmetrics is not installed.
    """
    try:
        import torchmetrics  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("as_torchmetric needs torchmetrics: pip install torchmetrics") from error

    class _Metric(torchmetrics.Metric):
        full_state_update = False

        def __init__(self) -> None:
            # this class gathers by itself: its state is counts and sums in an accumulator, no list of tensors
            super().__init__(sync_on_compute=False, compute_with_cache=False)
            self.accumulator = copy.deepcopy(accumulator)
            self.accumulator.reset()

        def update(self, *args: Any) -> None:
            self.accumulator.update(*args)

        def forward(self, *args: Any) -> torch.Tensor:
            batch = copy.deepcopy(accumulator)
            batch.reset()
            batch.update(*args)
            self.update(*args)
            return _scalar(batch.compute())

        def compute(self) -> torch.Tensor:
            return _scalar(_over_processes(self.accumulator).compute())

        def reset(self) -> None:
            super().reset()
            if hasattr(self, "accumulator"):
                self.accumulator.reset()

        def merge_state(self, incoming_state: Any) -> None:
            self.accumulator.merge(incoming_state.accumulator)

    return _Metric()


def _scalar(value: Any) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _over_processes(accumulator: Any) -> Any:
    """The accumulators of all processes merged, in the order of ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return accumulator
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, accumulator)
    merged = copy.deepcopy(parts[0])
    for part in parts[1:]:
        merged.merge(part)
    return merged
