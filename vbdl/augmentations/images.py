"""Augmentations of images, (batch, channels, height, width), named as in torchvision.transforms."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbdl.augmentations.drawing import check_padding, check_probability, each_row, moved


class RandomHorizontalFlip(nn.Module):
    """Mirror left and right, with probability p.

    >>> vbdl.augmentations.RandomHorizontalFlip(p=1.0)(torch.tensor([[[[1.0, 2.0, 3.0]]]]))
    tensor([[[[3., 2., 1.]]]])
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = check_probability(p)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand(each_row(x), device=x.device) < self.p, x.flip(-1), x)


class RandomVerticalFlip(nn.Module):
    """Mirror top and bottom, with probability p.

    >>> vbdl.augmentations.RandomVerticalFlip(p=1.0)(torch.tensor([[[[1.0], [2.0]]]])).flatten()
    tensor([2., 1.])
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = check_probability(p)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(torch.rand(each_row(x), device=x.device) < self.p, x.flip(-2), x)


class RandomShift(nn.Module):
    """Shift by up to so many pixels in both directions: a random crop of the padded image.

    pixels: the largest shift; each from -pixels to pixels is as likely.
    padding: what comes in: "zeros", the pixels at the "edge", or those that went out at the other side ("wrap").

    >>> vbdl.augmentations.RandomShift(4)(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 3, 32, 32])
    """

    def __init__(self, pixels: int, padding: str = "zeros"):
        super().__init__()
        if pixels < 1:
            raise ValueError(f"pixels must be at least 1, got {pixels}")
        self.pixels, self.padding = pixels, check_padding(padding)

    def forward(self, x: Tensor) -> Tensor:
        for axis in (-2, -1):
            by = torch.randint(-self.pixels, self.pixels + 1, each_row(x), device=x.device)
            x = moved(x, by, axis, self.padding)
        return x


class RandomRotation(nn.Module):
    """Rotate around the center by an angle from -degrees to degrees, with bilinear interpolation and zeros outside.

    >>> vbdl.augmentations.RandomRotation(10.0)(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 3, 32, 32])
    """

    def __init__(self, degrees: float):
        super().__init__()
        if not 0 < degrees <= 180:
            raise ValueError(f"degrees must be above 0 and at most 180, got {degrees}")
        self.degrees = degrees

    def forward(self, x: Tensor) -> Tensor:
        angle = (2 * torch.rand(x.shape[0], device=x.device, dtype=x.dtype) - 1) * math.radians(self.degrees)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        height, width = x.shape[-2:]
        # coordinates run from -1 to 1 in both directions, whatever the sides
        rotation = torch.stack([cos, -sin * (height / width), zero, sin * (width / height), cos, zero], dim=-1)
        grid = F.affine_grid(rotation.view(-1, 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class GaussianNoise(nn.Module):
    """Add normal noise to every element.

    std: standard deviation of the noise, in the units of the inputs.

    >>> vbdl.augmentations.GaussianNoise(0.1)(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 3, 32, 32])
    """

    def __init__(self, std: float = 0.1):
        super().__init__()
        if not (std > 0 and math.isfinite(std)):
            raise ValueError(f"std must be positive and finite, got {std}")
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x)
