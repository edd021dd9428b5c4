"""A small regression of two outputs, for tests of training."""

import torch
from torch import nn

FEATURES, OUTPUTS = 5, 2
ROUNDING = {"rtol": 2e-4, "atol": 2e-5}  # of two trainings that compute the same in another order


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, OUTPUTS))


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, FEATURES)
    return x, torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], dim=1) + 0.1 * torch.randn(n, OUTPUTS)
