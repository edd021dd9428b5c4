"""The single network that every method is compared with."""

from vbdl.bench.methods.deep_ensemble import ensemble
from vbdl.bench.registry import method
from vbdl.bench.task import Each, Run, Stacked, Task


@method("single")
def single(task: Task, run: Run) -> Stacked | Each:
    """a single network with its noise, trained like a member of the deep ensemble"""
    return ensemble(task, run, 1)
