"""Mean-field variational inference, with this project's own settings instead of a published protocol."""

import torch

from vbdl.bench.methods.training import plain, train
from vbdl.bench.registry import method
from vbdl.bench.task import Each, Run, Stacked, Task
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mean_field import MeanField

_SAMPLES = 1000


@method("mean-field")
def mean_field(task: Task, run: Run) -> Stacked | Each:
    """a normal distribution for every weight; one learned noise level on regression sets"""
    if task.protocol is None:
        wrap = lambda net: MeanField(net, task.n_train, prior=0.3, initial_std=0.03, seed=run.seed)
        epochs = 1.5 * task.recipe.get("epochs", 60)
        return plain(task, run, wrap, 0.0, "fit", epochs=epochs, kl_warmup=run.epochs(epochs / 4))
    run.notes.append(
        "own settings: one hidden layer, prior std 1, at most 500 epochs of 128 rows or 40,000 steps; the published "
        "column searched depth, width and learning rate for each split"
    )
    batch = 128
    steps = -(-task.n_train // batch)
    epochs = min(500, max(40, 40_000 // steps))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        base = MeanField(task.network(0.0, 1), n_data=task.n_train, prior=1.0, initial_std=0.02)
        q, likelihood = DeepEnsemble(base, task.n_splits, seed=run.seed), Gaussian(std=0.5)
    train(
        task,
        run,
        q,
        likelihood,
        epochs=epochs,
        batch_size=batch,
        name="fit",
        lr=5e-3,
        schedule="cosine",
        kl_warmup=run.epochs(epochs / 4),
    )
    run.details["noise_std"] = (likelihood.noise_std.flatten() * torch.tensor(task.scale)).tolist()
    return Stacked(q, likelihood, n_samples=run.draws(_SAMPLES), seed=run.seed)
