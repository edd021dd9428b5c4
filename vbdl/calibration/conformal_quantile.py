"""The rank on which every conformal promise rests."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from vbdl.metrics._checks import check_rate, check_scores


def conformal_rank(n: int, alpha: float) -> int:
    """⌈(n + 1)(1 - alpha)⌉, of the decimal that alpha is written as.

    In binary (9 + 1)(1 - 0.7) is 3.0000000000000004, and the rank would be one too high.
    """
    check_rate(alpha, "alpha")
    return math.ceil((n + 1) * (1 - Fraction(str(alpha))))


def conformal_quantile(scores: Tensor, alpha: float) -> Tensor:
    """The conformal_rank-th smallest score, (): infinite when there are too few. scores: (n,), n >= 0"""
    n = scores.numel()
    rank = conformal_rank(n, alpha)
    if rank > n:
        return torch.full((), math.inf, dtype=torch.float64, device=scores.device)
    return check_scores(scores).sort().values[rank - 1]
