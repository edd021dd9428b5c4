"""IVON with the data set's recipe, without a published protocol."""

from vbdl.bench.methods.training import plain, recipe
from vbdl.bench.registry import method
from vbdl.bench.task import Each, Run, Stacked, Task
from vbdl.methods import METHODS
from vbdl.posteriors.ivon import IVON


@method("ivon")
def ivon(task: Task, run: Run) -> Stacked | Each:
    """a normal distribution for every weight by natural gradients, with the paper's momenta"""
    wrap = lambda net: IVON(net, task.n_train, seed=run.seed)
    few = 10.0 if task.classes else 1.0  # the recipes have few epochs; a learned noise does not bear the larger rate
    lr = few * METHODS["ivon"].rate * recipe(task).get("lr", 3e-3)
    return plain(task, run, wrap, 0.0, "fit", lr=lr, weight_decay=0.0)
