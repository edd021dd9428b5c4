"""The conformal rank and quantile: which of n scores is the threshold that keeps the promised coverage."""

import math

import torch
from torch import Tensor

from vbdl.metrics._checks import check_rate, check_scores
from vbdl.metrics._counts import at_most


def conformal_rank(n: int, alpha: float) -> int:
    """⌈(n + 1)(1 - alpha)⌉, of the decimal that alpha was meant to be: 0.1 and 1 - 0.9 have one rank.

    alpha: the share of misses that is allowed; of a coverage it is 1 - coverage, rounded as it may be.
    """
    return n + 1 - at_most(check_rate(alpha, "alpha"), n + 1)


def conformal_quantile(scores: Tensor, alpha: float) -> Tensor:
    """The conformal_rank-th smallest score, (): infinite when there are too few. scores: (n,), n >= 0"""
    n = scores.numel()
    rank = conformal_rank(n, alpha)
    if rank > n:
        return torch.full((), math.inf, dtype=torch.float64, device=scores.device)
    return check_scores(scores).sort().values[rank - 1]
