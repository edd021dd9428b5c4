"""The class that as_torchmetric returns, in a module of its own because it needs torchmetrics."""

import copy
from typing import SupportsFloat

import torch
import torchmetrics

from vbdl.metrics.streaming import Accumulator


class AccumulatorMetric(torchmetrics.Metric):
    """A torchmetrics.Metric whose state is an accumulator of vbdl.metrics."""

    full_state_update = False

    def __init__(self, accumulator: Accumulator) -> None:
        # torchmetrics does not know the accumulator, so this class merges it over processes itself
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.accumulator = _emptied(accumulator)

    def update(self, *args: torch.Tensor) -> None:
        self.accumulator.update(*args)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        batch = _emptied(self.accumulator)
        batch.update(*args)
        self.update(*args)
        return _scalar(batch.compute())

    def compute(self) -> torch.Tensor:
        return _scalar(_over_processes(self.accumulator).compute())

    def reset(self) -> None:
        super().reset()
        self.accumulator.reset()

    def merge_state(self, incoming_state: "AccumulatorMetric") -> None:
        self.accumulator.merge(incoming_state.accumulator)


def _emptied(accumulator: Accumulator) -> Accumulator:
    emptied = copy.copy(accumulator)  # shallow: reset replaces the counts and rows, it never empties them in place
    emptied.reset()
    return emptied


def _scalar(value: SupportsFloat) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _over_processes(accumulator: Accumulator) -> Accumulator:
    """The accumulators of all processes merged in the order of their ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return accumulator
    parts = [accumulator] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, accumulator)
    merged = copy.deepcopy(parts[0])
    for part in parts[1:]:
        merged.merge(part)
    return merged
