"""The single network that every method is compared with."""

from vbdl.bench.methods.deep_ensemble import ensemble
from vbdl.bench.registry import method
from vbdl.bench.task import Each, Run, Stacked, Task


@method("single")
def single(task: Task, run: Run) -> Stacked | Each:
    """one network and its noise: an ensemble of one, by the ensemble's settings"""
    return ensemble(task, run, 1)
