"""The demo's networks, in plain torch without vbdl."""

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


def curve(width: int, dropout: float) -> nn.Module:
    """A smooth network with two hidden layers for a 1-d regression: (batch, 1) -> (batch, 1)."""
    return nn.Sequential(
        nn.Linear(1, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(width, 1),
    )
