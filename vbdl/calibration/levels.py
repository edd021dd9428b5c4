"""Levels (values) of a distribution function and their normal scores Φ⁻¹(level)."""

import torch
from torch import Tensor

from vbdl.likelihoods.mixture import FARTHEST_SCORE


def score_of(levels: Tensor) -> Tensor:
    """Φ⁻¹ of the levels in float64; an exact 0 or 1 is replaced by the next number in the levels' dtype."""
    info = torch.finfo(levels.dtype if levels.is_floating_point() else torch.float64)
    p = levels.to(torch.float64).clamp(max=1 - info.eps / 2)
    return torch.special.ndtri(torch.where(p <= 0, info.eps / 2, p)).clamp(-FARTHEST_SCORE, FARTHEST_SCORE)


def with_ends(levels: Tensor, mapped: Tensor) -> Tensor:
    """The mapped levels in the dtype of `levels`, exactly 0 at level 0 and 1 at level 1."""
    mapped = torch.where(levels <= 0, 0.0, torch.where(levels >= 1, 1.0, mapped))
    return mapped.to(levels.dtype if levels.is_floating_point() else torch.float64)
