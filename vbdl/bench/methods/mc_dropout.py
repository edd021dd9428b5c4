"""MC dropout, by the protocols of Gal and Ghahramani for data sets that have one."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vbdl.bench.methods.training import DecayedAdam, plain, train
from vbdl.bench.registry import method
from vbdl.bench.task import Each, Run, Stacked, Task
from vbdl.calling.likelihood_members import replicate
from vbdl.likelihoods.gaussian import Gaussian
from vbdl.posteriors.ensemble import DeepEnsemble
from vbdl.posteriors.mc_dropout import MCDropout

_LENGTH_SCALE = 1e-2
_SAMPLES = 10_000  # as published
_SEARCH_SAMPLES = 200  # draws used to select rate and precision


@method("mc-dropout")
def mc_dropout(task: Task, run: Run) -> Stacked | Each:
    """dropout in prediction; on UCI sets with rate and noise precision searched as published"""
    if task.protocol is None:
        return plain(task, run, lambda net: MCDropout(net, seed=run.seed), 0.2, "fit")
    return _searched(task, run)


def decay(p: float, rows: int, tau: float) -> float:
    """The weight decay for Adam on half the squared error: the protocol's l^2 (1 - p) / (2 N tau).

    In the protocol lambda |w|^2 is added to the mean squared error and has the gradient 2 lambda w; here half of both
    is minimized.
    """
    return _LENGTH_SCALE**2 * (1 - p) / (2 * rows * tau)


def _searched(task: Task, run: Run) -> Stacked:
    """Select rate and precision of each split by the likelihood of its last fifth, then train again on all of it.

    The search trains one network for each split and rate, with the middle precision in its weight decay (below 2e-6 on
    every data set), and evaluates it with each precision. The final training uses the decay of the selected pair. Both
    are single stacked trainings of all splits.
    """
    how, splits = task.protocol, range(task.n_splits)
    assert how is not None
    run.notes.append("the search trains one network a rate, with the middle tau in its weight decay (below 2e-6)")
    cut = int(task.n_train * 0.8)
    middle = sorted(how.of.taus)[1]
    tried = [(split, p, middle) for p in how.rates for split in splits]
    searched = _fit(task, run, tried, cut, "search")
    held = task.x[:, cut : task.n_train], task.y[:, cut : task.n_train, 0]
    scale = torch.tensor(task.scale)
    best: list[tuple[float, float, float]] = [(-math.inf, 0.0, 0.0)] * task.n_splits
    for p in how.rates:
        q = _dropping(task, run, searched, p, [i for i, network in enumerate(tried) if network[1] == p])
        judged = Stacked(q, Gaussian(std=1.0, learned=False), n_samples=_SEARCH_SAMPLES, seed=run.seed)
        means = torch.cat([chunk[..., 0, 0] for chunk in judged.parameters(held[0])])
        error = (means - held[1]) * scale[:, None]  # (draws, splits, rows) target units
        for tau in how.of.taus:
            each = torch.logsumexp(-0.5 * tau * error.square(), dim=0) - math.log(len(means)) + 0.5 * math.log(tau)
            for split, ll in enumerate(each.double().mean(1).tolist()):
                best[split] = max(best[split], (ll, p, tau))
    run.details["rate"] = [b[1] for b in best]
    run.details["tau"] = [b[2] for b in best]
    refitted = _fit(task, run, [(split, p, tau) for split, (_, p, tau) in enumerate(best)], task.n_train, "refit")
    trained: dict[float, tuple[list[int], DeepEnsemble]] = {}
    for p in sorted({b[1] for b in best}):
        chosen = [split for split in splits if best[split][1] == p]
        trained[p] = chosen, _dropping(task, run, refitted, p, chosen)
    noise = [1 / (math.sqrt(tau) * s) for (_, _, tau), s in zip(best, task.scale, strict=True)]
    return _ByRate(trained, noise, run.draws(_SAMPLES), run.seed)


class _StackedRate(nn.Module):
    """A dropout layer for training whose rate is in the state, so that networks with different rates can be stacked.

    Its masks come from torch's generator, which `fit` seeds for every epoch: the counter-based noise of predictions
    would cost twice the rest of a step, because the masks of all rows and networks need most of the random numbers.
    """

    rate: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("rate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # it is predicted with as MC dropout, by `_dropping`
            return x
        return x * ((torch.rand_like(x) >= self.rate) / (1 - self.rate))


def _with_stacked_rates(network: nn.Module) -> nn.Module:
    """Replace each nn.Dropout of the network by _StackedRate, in place, and return the network."""
    for parent in network.modules():
        for name, child in parent._modules.items():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, _StackedRate())
    return network


def _fit(task: Task, run: Run, networks: list[tuple[int, float, float]], stop: int, name: str) -> DeepEnsemble:
    """Train a network for each (split, rate, precision) on the first `stop` rows of its split, in one stack."""
    how = task.protocol
    assert how is not None
    splits, rates, taus = zip(*networks, strict=True)
    q = DeepEnsemble(_with_stacked_rates(task.network(0.5, 1)), len(networks), seed=run.seed)
    for entry, tensor in q.stacked().items():
        if entry.rpartition(".")[2] == "rate":
            tensor.copy_(torch.tensor(rates))
    weights = torch.tensor([decay(p, stop, tau) for p, tau in zip(rates, taus, strict=True)])
    from torch._inductor import config  # here, because the import takes a second

    # compiled steps draw masks from torch's generator, too
    with config.patch(fallback_random=True):
        train(
            task,
            run,
            q,
            Gaussian(std=1.0, learned=False),  # half the squared error
            epochs=how.epochs,
            batch_size=how.batch_size,
            name=name,
            stop=stop,
            splits=list(splits),
            optimizer=lambda ps: DecayedAdam(ps, 1e-3, weights),
        )
    return q


@torch.no_grad()
def _dropping(task: Task, run: Run, trained: DeepEnsemble, p: float, which: list[int]) -> DeepEnsemble:
    """The trained networks `which`, all of rate p, as an ensemble of MC dropout posteriors."""
    q = DeepEnsemble(MCDropout(task.network(p, 1)), len(which), seed=run.seed)
    state = trained.stacked()
    for name, tensor in q.stacked().items():
        if name.startswith("inner."):
            tensor.copy_(state[name.removeprefix("inner.")][which])
    return q


class _ByRate(Stacked):
    """Trained splits with different rates, which are different architectures, as one stacked posterior."""

    def __init__(
        self, trained: dict[float, tuple[list[int], DeepEnsemble]], noise: list[float], n_samples: int, seed: int
    ):
        self.trained, self.noise, self.n_samples, self.seed = trained, noise, n_samples, seed

    def parameters(self, x: Tensor) -> Iterator[Tensor]:
        parts = []
        for chosen, q in self.trained.values():
            likelihood = Gaussian(std=1.0)
            replicate(likelihood, len(chosen))
            with torch.no_grad():
                likelihood.log_std.copy_(torch.tensor([self.noise[k] for k in chosen]).log().unsqueeze(1))
            stacked = Stacked(q, likelihood, n_samples=self.n_samples, seed=self.seed)
            parts.append((chosen, stacked.parameters(x[chosen])))
        yield from _together(parts, x.shape[0], self.n_samples)


def _together(
    parts: list[tuple[list[int], Iterator[Tensor]]], n_splits: int, n_samples: int, size: int = 50
) -> Iterator[Tensor]:
    """Yield chunks (size, splits, rows, ...) joined from the parts' chunks, whose lengths differ."""
    waiting: dict[int, list[Tensor]] = {i: [] for i in range(len(parts))}
    for start in range(0, n_samples, size):
        count = min(size, n_samples - start)
        joined_draws = None
        for i, (chosen, chunks) in enumerate(parts):
            while sum(len(c) for c in waiting[i]) < count:
                waiting[i].append(next(chunks))
            joined = torch.cat(waiting[i])
            waiting[i] = [joined[count:]]
            if joined_draws is None:
                joined_draws = joined.new_empty((count, n_splits, *joined.shape[2:]))
            joined_draws[:, chosen] = joined[:count]
        assert joined_draws is not None
        yield joined_draws
