"""The prediction loop of most tutorials: one forward pass per sample, in eager torch."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vbdl.demo.training import DROPOUT, ENSEMBLE, MEAN_FIELD, Trained
from vbdl.nn.sampled import SampledNetwork
from vbdl.posteriors.ensemble import DeepEnsemble

Loop = Callable[[Tensor, int], Tensor]


def loop(trained: Trained) -> Loop:
    """The tutorial loop of a method: a function (inputs, samples) -> (samples, batch, ...) parameters of p(y | x)."""
    return {DROPOUT: _dropout, MEAN_FIELD: _mean_field, ENSEMBLE: _ensemble}[trained.method](trained)


def _dropout(trained: Trained) -> Loop:
    network = copy.deepcopy(trained.posterior.user_network).eval()
    for m in network.modules():
        if isinstance(m, nn.Dropout):
            m.train()

    @torch.no_grad()
    def run(x: Tensor, n_samples: int) -> Tensor:
        return torch.stack([trained.likelihood(network(x)) for _ in range(n_samples)])

    return run


def _mean_field(trained: Trained) -> Loop:
    sampled = trained.posterior.module
    assert isinstance(sampled, SampledNetwork)
    network = copy.deepcopy(sampled.inner).eval()
    weights = dict(network.named_parameters())
    normals = {n: (mean.detach(), log_std.detach().exp()) for n, mean, log_std in sampled.normals()}

    @torch.no_grad()
    def run(x: Tensor, n_samples: int) -> Tensor:
        samples = []
        for _ in range(n_samples):
            for name, (mean, std) in normals.items():
                weights[name].copy_(torch.addcmul(mean, std, torch.randn_like(mean)))
            samples.append(trained.likelihood(network(x)))
        return torch.stack(samples)

    return run


def _ensemble(trained: Trained) -> Loop:
    posterior, members = trained.posterior, []
    assert isinstance(posterior, DeepEnsemble)
    for m in range(posterior.n_members):
        network, likelihood = trained.task.network(0.0).eval(), trained.task.likelihood()
        network.load_state_dict(posterior.member(m))
        stacked = dict(trained.likelihood.named_parameters())
        for name, p in likelihood.named_parameters():
            p.data.copy_(stacked[name][m])
        members.append((network, likelihood))

    @torch.no_grad()
    def run(x: Tensor, n_samples: int) -> Tensor:
        return torch.stack([likelihood(network(x)) for network, likelihood in members[:n_samples]])

    return run
