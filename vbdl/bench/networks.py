"""The networks of the suite, in plain torch."""

from torch import Tensor, nn


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


class _Block(nn.Module):
    """Two convolutions with batch normalization, added to a convolution of size one of their input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.skip(x)).relu()


def residual(channels: int, side: int, p: float, outputs: int) -> nn.Module:
    """A small residual network, (batch, channels, side, side) -> (batch, outputs): 8 layers, 16 to 64 channels.

    Its first convolution has a stride of 2; if p > 0 dropout before the last layer.
    """
    drop = [nn.Dropout(p)] if p > 0 else []
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        _Block(16, 16, 1),
        _Block(16, 32, 2),
        _Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *drop,
        nn.Linear(64, outputs),
    )
