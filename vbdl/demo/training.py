"""The three methods of the demo, and the single network they are compared with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vbdl.demo.data import Task
from vbdl.posteriors.deterministic import Deterministic
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.laplace import Laplace
from vbdl.posteriors.mc_dropout import MCDropout
from vbdl.posteriors.mean_field import MeanField
from vbdl.training.fit import fit
from vbdl.types import Keywords, Likelihood, Posterior

SINGLE, DROPOUT, MEAN_FIELD, ENSEMBLE = "single network", "MC dropout", "mean-field", "deep ensemble"

N_DRAWS = 64  # draws of dropout and mean-field
N_MEMBERS = 5
RATES = {DROPOUT: 0.2, MEAN_FIELD: 0.0, ENSEMBLE: 0.1}  # dropout rates of the networks


@dataclass(frozen=True)
class Method:
    """The construction and the training options of a method; n_samples None means every member."""

    build: Callable[[Task, nn.Module, int], Posterior]  # (task, network, seed) -> posterior
    n_samples: int | None
    training: Keywords


METHODS: dict[str, Method] = {
    DROPOUT: Method(lambda task, network, seed: MCDropout(network, seed=seed), N_DRAWS, {"lr": 3e-3, "patience": 15}),
    MEAN_FIELD: Method(
        lambda task, network, seed: MeanField(network, len(task.y["train"]), prior=0.3, initial_std=0.03, seed=seed),
        N_DRAWS,
        {"lr": 1e-2, "patience": 25, "kl_warmup": 20},
    ),
    ENSEMBLE: Method(
        lambda task, network, seed: DeepEnsemble(network, N_MEMBERS, seed=seed), None, {"lr": 3e-3, "patience": 10}
    ),
}


@dataclass
class Trained:
    """A posterior and its likelihood, with the seconds and epochs of their training."""

    task: Task
    method: str
    posterior: Posterior  # of the class of its method
    likelihood: Likelihood
    n_samples: int | None
    seconds: float = 0.0
    epochs: int = 0


def build(task: Task, method: str, seed: int = 0) -> Trained:
    """Build an untrained posterior; the initialization of its network is a function of the seed."""
    how = METHODS[method]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = task.network(RATES[method])
    return Trained(task, method, how.build(task, network, seed), task.likelihood(), how.n_samples)


def train(task: Task, method: str, seed: int = 0, effort: float = 1.0) -> Trained:
    """Build and train a method. effort: fraction of the epochs, for a quick look."""
    trained = build(task, method, seed)
    options = {
        "epochs": task.epochs,
        "batch_size": 64,
        "validation": (task.x["validation"], task.y["validation"]),
        "schedule": "cosine",
        **METHODS[method].training,
    }
    options["epochs"] = max(1, round(effort * options["epochs"]))
    history = fit(
        trained.posterior,
        (task.x["train"], task.y["train"]),
        trained.likelihood,
        seed=seed,
        progress=False,
        **options,
    )
    trained.seconds, trained.epochs = history.seconds, history.epochs
    return trained


def single(ensemble: Trained) -> Trained:
    """The first member of an ensemble as a single network; it is trained as if alone (tests/test_train.py)."""
    task, posterior = ensemble.task, ensemble.posterior
    assert isinstance(posterior, DeepEnsemble)
    network = task.network(RATES[ENSEMBLE])
    network.load_state_dict(posterior.member(0))
    likelihood = task.likelihood()
    with torch.no_grad():
        stacked = dict(ensemble.likelihood.named_parameters())
        for name, p in likelihood.named_parameters():
            p.copy_(stacked[name][0])
    seconds = ensemble.seconds / N_MEMBERS
    return Trained(task, SINGLE, DeepEnsemble([network]), likelihood, None, seconds, ensemble.epochs)


def around_a_gap(task: Task, seed: int = 0, effort: float = 1.0) -> list[Trained]:
    """Train a network for the curve, take it alone and with a Laplace approximation, and train an ensemble of ten.

    There is no early stopping, for which the validation rows are too few.
    """
    rows, n = (task.x["train"], task.y["train"]), len(task.y["train"])
    options: Keywords = {
        "epochs": max(1, round(effort * task.epochs)),
        "lr": 1e-2,
        "schedule": "cosine",
        "seed": seed,
        "progress": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = task.network(0.0)
    of_laplace, of_ensemble = task.likelihood(), task.likelihood()
    laplace = Laplace(network, n, parameters="all", structure="full", prior_precision=0.3)
    fit(laplace, rows, of_laplace, **options)
    alone = Deterministic(laplace.user_network)
    ensemble = DeepEnsemble(network, 10, seed=seed)
    fit(ensemble, rows, of_ensemble, bootstrap=True, weight_decay=0.0, **options)
    return [
        Trained(task, "a trained network", alone, of_laplace, None),
        Trained(task, "the same network with Laplace", laplace, of_laplace, 256),
        Trained(task, "deep ensemble of ten", ensemble, of_ensemble, None),
    ]
