"""The demo's networks: plain torch, nothing of vbdl in them."""

import torch
from torch import nn


def mlp(inputs: int, outputs: int, width: int, dropout: float) -> nn.Module:
    """(batch, inputs) -> (batch, outputs), two hidden layers"""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, outputs),
    )


def cnn(classes: int, dropout: float) -> nn.Module:
    """(batch, 1, 8, 8) -> (batch, classes), two convolutions"""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, classes),
    )


class Hinges(nn.Linear):
    """A first layer for one input: units that bend somewhere in [-reach, reach], each in another place."""

    def __init__(self, width: int, reach: float, slope: float):
        self.reach, self.slope = reach, slope
        super().__init__(1, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0, self.slope)
        self.bias.uniform_(-self.reach, self.reach).mul_(-self.weight.squeeze(1))


def curve(width: int, dropout: float) -> nn.Module:
    """(batch, 1) -> (batch, 1), a 1-d regression; one hidden layer"""
    return nn.Sequential(Hinges(width, reach=4.5, slope=1.0), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))
