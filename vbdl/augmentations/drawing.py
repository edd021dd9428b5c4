"""What augmentations share: one number for each row, and rows moved along an axis."""

import torch
from torch import Tensor

PADDINGS = ("zeros", "edge", "wrap")


def each_row(x: Tensor) -> tuple[int, ...]:
    """The shape of one number for each row, which broadcasts against x: (batch, 1, ...)."""
    return (x.shape[0], *[1] * (x.ndim - 1))


def check_probability(p: float) -> float:
    """The probability. Raises ValueError outside [0, 1]."""
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability from 0 to 1, got {p}")
    return p


def check_padding(padding: str) -> str:
    """The name of a padding. Raises ValueError for another one."""
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}")
    return padding


def moved(x: Tensor, by: Tensor, axis: int, padding: str) -> Tensor:
    """Move each row along an axis: result[..., i, ...] = x[..., i - by, ...].

    by: whole numbers that broadcast against x, of length 1 in all axes but the first.
    padding: what comes in: "zeros", the value at the "edge", or what went out at the other end ("wrap").
    """
    axis = axis % x.ndim
    length = x.shape[axis]
    places = torch.arange(length, device=x.device).view(*[-1 if a == axis else 1 for a in range(x.ndim)])
    source = places - by
    inside = (source >= 0) & (source < length)
    source = source.remainder(length) if padding == "wrap" else source.clamp(0, length - 1)
    result = x.gather(axis, source.expand_as(x))
    return torch.where(inside, result, torch.zeros_like(result)) if padding == "zeros" else result
