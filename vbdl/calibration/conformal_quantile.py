"""The conformal rank and quantile: the threshold among n scores that guarantees the coverage."""

import math

import torch
from torch import Tensor

from vbdl.metrics._checks import check_rate, check_scores
from vbdl.metrics._counts import at_most


def conformal_rank(n: int, alpha: float) -> int:
    """The rank ⌈(n + 1)(1 - alpha)⌉, computed for the decimal that alpha was meant to be, e.g. 0.1 for 1 - 0.9.

    alpha: allowed share of misses, 1 - coverage.

    >>> vbdl.calibration.conformal_rank(n=19, alpha=0.1)
    18
    """
    return n + 1 - at_most(check_rate(alpha, "alpha"), n + 1)


def conformal_quantile(scores: Tensor, alpha: float) -> Tensor:
    """The conformal_rank-th smallest score, (); infinite if there are too few scores. scores: (n,), n >= 0

    >>> vbdl.calibration.conformal_quantile(torch.arange(19.0), alpha=0.1)
    tensor(17., dtype=torch.float64)
    >>> vbdl.calibration.conformal_quantile(torch.arange(5.0), alpha=0.1)  # too few scores
    tensor(inf, dtype=torch.float64)
    """
    n = scores.numel()
    rank = conformal_rank(n, alpha)
    if rank > n:
        return torch.full((), math.inf, dtype=torch.float64, device=scores.device)
    return check_scores(scores).sort().values[rank - 1]
