"""Augmentations of series, (batch, time, channels) or (batch, time), named as in the literature on sensor data.

Um et al., Data Augmentation of Wearable Sensor Data for Parkinson's Disease Monitoring using Convolutional Neural
Networks, ICMI 2017, https://arxiv.org/abs/1706.00527; Iwana and Uchida 2021, https://arxiv.org/abs/2007.15951
"""

import math

import torch
from torch import Tensor, nn

from vbdl.augmentations.drawing import check_padding, each_row, moved
from vbdl.augmentations.images import GaussianNoise


class Jitter(GaussianNoise):
    """Add normal noise to every value of a series.

    std: standard deviation of the noise, in the units of the inputs.

    >>> vbdl.augmentations.Jitter(0.05)(torch.randn(8, 100, 3)).shape
    torch.Size([8, 100, 3])
    """

    def __init__(self, std: float = 0.05):
        super().__init__(std)


class Scaling(nn.Module):
    """Multiply each series by one number around 1.

    std: standard deviation of that number, which is normal.

    >>> vbdl.augmentations.Scaling(0.1)(torch.randn(8, 100, 3)).shape
    torch.Size([8, 100, 3])
    """

    def __init__(self, std: float = 0.1):
        super().__init__()
        if not (std > 0 and math.isfinite(std)):
            raise ValueError(f"std must be positive and finite, got {std}")
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.std * torch.randn(each_row(x), device=x.device, dtype=x.dtype))


class TimeShift(nn.Module):
    """Shift a series along the time by up to so many steps, to earlier or later.

    steps: the largest shift; each from -steps to steps is as likely.
    padding: what comes in: the value at the "edge", "zeros", or what went out at the other end ("wrap").
    axis: of the time.

    >>> vbdl.augmentations.TimeShift(5)(torch.randn(8, 100, 3)).shape
    torch.Size([8, 100, 3])
    """

    def __init__(self, steps: int, padding: str = "edge", axis: int = 1):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if axis == 0:
            raise ValueError("axis 0 is the batch: give the axis of the time, e.g. axis=1")
        self.steps, self.padding, self.axis = steps, check_padding(padding), axis

    def forward(self, x: Tensor) -> Tensor:
        by = torch.randint(-self.steps, self.steps + 1, each_row(x), device=x.device)
        return moved(x, by, self.axis, self.padding)
