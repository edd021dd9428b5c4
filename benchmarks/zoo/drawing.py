"""Networks that draw their weights in every forward pass: textbook layers, and the layers of two libraries."""

import torch
from torch import nn
from workloads import TutorialLinear, mlp

from vbdl import Categorical

from . import Network, numbers

STD = 0.05


def _dense(layer) -> nn.Sequential:
    """The dense network 64-256-256-10 with this layer in place of nn.Linear."""
    network = mlp(64, 256, 256, 10)
    for name, m in list(network.named_children()):
        if isinstance(m, nn.Linear):
            setattr(network, name, layer(m))
    return network


def textbook() -> nn.Sequential:
    """The layer of most tutorials on mean-field inference."""
    log_std = lambda t: torch.full_like(t, STD).log()
    return _dense(lambda m: TutorialLinear(m, log_std(m.weight), log_std(m.bias)))


def bayesian_torch() -> nn.Sequential:
    """LinearReparameterization of bayesian-torch, as its converter of networks sets it."""
    from bayesian_torch.layers import LinearReparameterization

    def layer(m: nn.Linear) -> nn.Module:
        made = LinearReparameterization(m.in_features, m.out_features, posterior_rho_init=-3.0)
        made.dnn_to_bnn_flag = True  # no KL in prediction
        return made

    return _dense(layer)


def blitz() -> nn.Sequential:
    """BayesianLinear of blitz."""
    from blitz.modules import BayesianLinear

    return _dense(lambda m: BayesianLinear(m.in_features, m.out_features, posterior_rho_init=-3.0))


NETWORKS = [
    Network(name, f"dense 64-256-256-10, {title}", build, numbers(64), Categorical, ("stochastic",))
    for name, title, build in (
        ("textbook", "textbook layers", textbook),
        ("bayesian-torch", "layers of bayesian-torch", bayesian_torch),
        ("blitz", "layers of blitz", blitz),
    )
]
