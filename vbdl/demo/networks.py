"""The demo's networks, in plain torch without vbdl."""

import torch
from torch import nn


def mlp(inputs: int, outputs: int, width: int, dropout: float) -> nn.Module:
    """A multilayer perceptron with two hidden layers: (batch, inputs) -> (batch, outputs)."""
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
    """A network with two convolutions: (batch, 1, 8, 8) -> (batch, classes)."""
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
    """A first layer for one input, whose units have their kinks at different places in [-reach, reach]."""

    def __init__(self, width: int, reach: float, slope: float):
        self.reach, self.slope = reach, slope
        super().__init__(1, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0, self.slope)
        self.bias.uniform_(-self.reach, self.reach).mul_(-self.weight.squeeze(1))


def curve(width: int, dropout: float) -> nn.Module:
    """A network with one hidden layer for a 1-d regression: (batch, 1) -> (batch, 1)."""
    return nn.Sequential(Hinges(width, reach=4.5, slope=1.0), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))
