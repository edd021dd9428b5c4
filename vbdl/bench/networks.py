"""The networks of the suite, in plain torch."""

from torch import nn


def one_hidden(features: int, hidden: int, p: float, outputs: int) -> nn.Module:
    """A network with one hidden layer, (batch, features) -> (batch, outputs); if p > 0 dropout before both layers."""
    drop = [nn.Dropout(p)] if p > 0 else []
    return nn.Sequential(*drop, nn.Linear(features, hidden), nn.ReLU(), *drop, nn.Linear(hidden, outputs))


def mlp(features: int, width: int, p: float, outputs: int) -> nn.Module:
    """A network with two hidden layers, (batch, features) -> (batch, outputs); if p > 0 dropout after each."""
    drop = [nn.Dropout(p)] if p > 0 else []
    first = [nn.Linear(features, width), nn.ReLU(), *drop]
    return nn.Sequential(*first, nn.Linear(width, width), nn.ReLU(), *drop, nn.Linear(width, outputs))


def convolutional(channels: int, side: int, p: float, outputs: int) -> nn.Module:
    """A convolutional network, (batch, channels, side, side) -> (batch, outputs).

    It has two strided convolutions and two linear layers, with dropout before each linear layer if p > 0.
    """
    drop = [nn.Dropout(p)] if p > 0 else []
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        *drop,
        nn.Linear(32 * (-(-side // 4)) ** 2, 64),
        nn.ReLU(),
        *drop,
        nn.Linear(64, outputs),
    )
