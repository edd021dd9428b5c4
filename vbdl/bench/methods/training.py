"""The training shared by the built-in methods: networks for all splits and members, trained in stacked steps."""

import copy
import math
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from vbdl.bench.task import Each, FitOptions, Recipe, Run, Stacked, Task
from vbdl.engine.predictor import Predictor
from vbdl.likelihoods.categorical import Categorical
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.methods import Method
from vbdl.nn.objective import KeyedPosterior
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.training.fit import History, fit
from vbdl.types import Likelihood, Posterior

_SAMPLES = 100  # draws in evaluation if no protocol gives a number
_COLLECTED = 8  # epochs that a method needs at least that collects weights
_COMPILE_STEPS = 1000  # compiling takes about 5 s and saves about 5 ms per small stacked step


class DecayedAdam(torch.optim.Adam):
    """Adam with a weight decay for each member, added to the gradient like `weight_decay`.

    decay: (members,); parameters must have a leading members axis.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, decay: Tensor):
        super().__init__(params, lr=lr, fused=True)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.addcmul_(p, self.decay.view(-1, *[1] * (p.ndim - 1)))
        return super().step(closure)


def outputs(task: Task) -> int:
    return len(task.classes) or 1


def likelihood_of(task: Task) -> Likelihood:
    return Gaussian(std=0.5) if task.regression else Categorical()


def train(
    task: Task,
    run: Run,
    posterior: Posterior,
    likelihood: Likelihood,
    *,
    epochs: float,
    batch_size: int,
    name: str,
    per_split: int = 1,
    seed: int | None = None,
    stop: int | None = None,
    splits: list[int] | None = None,
    **options: Unpack[FitOptions],
) -> History:
    """Train a stacked posterior with `fit`, each member on the rows of its split.

    seed: of the row orders; default: that of the run.
    stop: number of rows of each split to train on; default: its whole training part.
    splits: split of each member; default: all splits in order, with per_split members each.
    """
    stop = task.n_train if stop is None else stop
    rows = task.numbers(0, stop)
    rows = rows if splits is None else rows[splits]
    total = run.epochs(epochs)
    steps = total * math.ceil(stop / batch_size)
    if posterior.n_members > 1:
        member_rows = rows.repeat_interleave(per_split, dim=0)
        x, y = task.rows
    else:
        member_rows = None
        x, y = (t[rows[0]] for t in task.rows)
    return fit(
        posterior,
        (x, y),
        likelihood,
        member_rows=member_rows,
        epochs=total,
        batch_size=batch_size,
        seed=run.seed if seed is None else seed,
        compile=steps >= _COMPILE_STEPS if run.compile is None else run.compile,
        checkpoint=run.checkpoint(name),
        checkpoint_every=max(1, total // 20),
        progress=run.progress,
        **options,
    )


def recipe(task: Task, **options: Unpack[Recipe]) -> Recipe:
    """The options of `train` for a data set without a published protocol; `options` replace those of the data set."""
    return {"epochs": 60, "batch_size": 64, "lr": 3e-3, "schedule": "cosine", **task.recipe, **options}


def without_protocol(method: Method) -> Callable[[Task, Run], Stacked | Each]:
    """A function train(task, run) that trains this method with the data set's recipe, without a published protocol."""

    def trained(task: Task, run: Run) -> Stacked | Each:
        wrap = lambda network: method.make(network, n_data=task.n_train, n_members=5, seed=run.seed)
        options: Recipe = {}
        if method.collects:  # at a rate that does not fall to 0 at the end, and in a few epochs whatever the effort is
            options = {"schedule": None, "epochs": max(recipe(task).get("epochs", 0.0), _COLLECTED / run.effort)}
        return plain(task, run, wrap, method.dropout, "fit", **options)

    trained.__doc__ = f"{method.words}, without a published protocol"
    return trained


def plain(
    task: Task, run: Run, wrap: Callable[[nn.Module], Posterior], p: float, name: str, **options: Unpack[Recipe]
) -> Stacked | Each:
    """Train `wrap(network)` on every split without a published protocol.

    All splits are trained as one ensemble if its members can be posteriors of this kind, else one after the other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        network = task.network(p, outputs(task))
    likelihood, n_samples = likelihood_of(task), run.draws(_SAMPLES)
    posterior = wrap(network)
    if task.n_splits == 1 or not isinstance(posterior, KeyedPosterior):
        predictors = []
        for split in range(task.n_splits):
            if split:  # another initialization; posteriors of one network draw the rest from the seed of `fit`
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(run.seed + split)
                    posterior = wrap(task.network(p, outputs(task)))
            q, noise = copy.deepcopy(posterior), copy.deepcopy(likelihood)
            checkpoint = name if task.n_splits == 1 else f"{name}-{split}"
            train(
                task,
                run,
                q,
                noise,
                name=checkpoint,
                splits=[split],
                per_split=q.n_members,
                seed=run.seed + split,
                **recipe(task, **options),
            )
            draws = n_samples if q.n_draws is None else None
            predictors.append(Predictor(q, noise, draws, run.seed, compile=False, tiles=(256,)))
        return Each(predictors)
    posterior = DeepEnsemble(posterior, task.n_splits, seed=run.seed)
    train(task, run, posterior, likelihood, name=name, **recipe(task, **options))
    return Stacked(posterior, likelihood, n_samples=n_samples, seed=run.seed)
