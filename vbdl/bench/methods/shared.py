"""The networks that methods for trained networks start from: one for each split, trained once a run and kept."""

import copy
import os
import time
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vbdl.bench.methods.training import likelihood_of, outputs, recipe, train
from vbdl.bench.task import Run, Task
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.types import Likelihood

_NOISE, _SECONDS = "likelihood.", "seconds"


@dataclass(frozen=True)
class Trained:
    """The network of a split, trained without dropout, with its likelihood."""

    network: nn.Module
    likelihood: Likelihood


def trained_networks(task: Task, run: Run) -> list[Trained]:
    """Train a network for each split by the data set's recipe, or read those that another method of this run trained.

    Adds the seconds of their training to `run.network_seconds`, and to `run.waited` if this call trained them.
    """
    stored = load_file(run.networks) if run.networks is not None and run.networks.is_file() else None
    if stored is None:
        begun = time.perf_counter()
        stored = _train(task, run)
        run.waited += (seconds := time.perf_counter() - begun)
        stored[_SECONDS] = torch.tensor(seconds, dtype=torch.float64)
        if run.networks is not None:
            run.networks.parent.mkdir(parents=True, exist_ok=True)
            partial = run.networks.with_name(f"{run.networks.name}.{os.getpid()}.partial")
            save_file(stored, partial)
            os.replace(partial, run.networks)
    run.network_seconds += float(stored.pop(_SECONDS))
    return [_of_split(task, stored, split) for split in range(task.n_splits)]


def _train(task: Task, run: Run) -> dict[str, Tensor]:
    """The entries of all networks and their likelihoods, (splits, ...) each: trained in one stacked step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        q = DeepEnsemble(task.network(0.0, outputs(task)), task.n_splits, seed=run.seed)
    likelihood = likelihood_of(task)
    train(task, run, q, likelihood, name="networks", **recipe(task))
    noise = {f"{_NOISE}{name}": t for name, t in likelihood.state_dict().items()}
    if task.n_splits == 1:  # `fit` gives the likelihood of several members an axis for them
        noise = {name: t.unsqueeze(0) for name, t in noise.items()}
    return {n: t.detach().contiguous().clone() for n, t in {**q.stacked(), **noise}.items()}


def _of_split(task: Task, stored: dict[str, Tensor], split: int) -> Trained:
    network, likelihood = task.network(0.0, outputs(task)), copy.deepcopy(likelihood_of(task))
    own = {name: t[split] for name, t in stored.items()}
    network.load_state_dict({n: t for n, t in own.items() if not n.startswith(_NOISE)})
    likelihood.load_state_dict({n.removeprefix(_NOISE): t for n, t in own.items() if n.startswith(_NOISE)})
    return Trained(network, likelihood)
