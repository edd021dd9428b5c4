"""The class behind as_torchmetric; imported by it alone, since it needs torchmetrics."""

import copy
from typing import Any

import torch
import torchmetrics


class AccumulatorMetric(torchmetrics.Metric):
    """An accumulator of vbdl.metrics in the dress of a torchmetrics.Metric."""

    full_state_update = False

    def __init__(self, accumulator: Any) -> None:
        # this class gathers by itself: its state is counts and sums in an accumulator, no list of tensors
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.accumulator = _emptied(accumulator)

    def update(self, *args: Any) -> None:
        self.accumulator.update(*args)

    def forward(self, *args: Any) -> torch.Tensor:
        batch = _emptied(self.accumulator)
        batch.update(*args)
        self.update(*args)
        return _scalar(batch.compute())

    def compute(self) -> torch.Tensor:
        return _scalar(_over_processes(self.accumulator).compute())

    def reset(self) -> None:
        super().reset()
        self.accumulator.reset()

    def merge_state(self, incoming_state: Any) -> None:
        self.accumulator.merge(incoming_state.accumulator)


def _emptied(accumulator: Any) -> Any:
    made = copy.copy(accumulator)  # shallow, since reset replaces what has been gathered and never empties it in place
    made.reset()
    return made


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
