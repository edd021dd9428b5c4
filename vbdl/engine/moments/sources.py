"""Rules for the sources of randomness: the random words behind dropout masks, and the normal noise of weights."""

import torch
from torch import Tensor

from vbdl.engine.moments.value import Moments, Uniform, rule


def words(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Uniform:
    """The distribution of vbdl::words: uniform 32-bit words, (rows, columns)."""
    return Uniform((rows, columns), key.device)


def normal(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Moments:
    """The moments of vbdl::normal: means 0 and variances 1, (rows, columns)."""
    return Moments(torch.zeros(rows, columns, device=key.device), torch.ones(rows, columns, device=key.device))


@rule("ge")
def at_least(x: Uniform, threshold: int) -> Moments:
    """The moments of a dropout mask, word >= threshold, which is Bernoulli(1 - threshold / 2^32)."""
    if not isinstance(x, Uniform):
        raise ValueError("moment propagation has no rule to compare random values: use estimator='sampling'")
    keep = 1.0 - threshold / 2.0**32
    return Moments(
        torch.full(x.shape, keep, device=x.device), torch.full(x.shape, keep * (1.0 - keep), device=x.device)
    )
