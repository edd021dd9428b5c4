"""Where randomness comes from: the words that masks are made of, and the normals of weights."""

import torch
from torch import Tensor

from vbdl.engine.moments.value import Moments, Uniform, rule


def words(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Uniform:
    """vbdl::words"""
    return Uniform((rows, columns), key.device)


def normal(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Moments:
    """vbdl::normal: mean 0, variance 1"""
    return Moments(torch.zeros(rows, columns, device=key.device), torch.ones(rows, columns, device=key.device))


@rule("ge")
def at_least(x: Uniform, threshold: int) -> Moments:
    """A mask: 1 where a word is at least the threshold, by Bernoulli."""
    if not isinstance(x, Uniform):
        raise ValueError("moment propagation cannot follow a comparison of random values: use estimator='sampling'")
    keep = 1.0 - threshold / 2.0**32
    return Moments(
        torch.full(x.shape, keep, device=x.device), torch.full(x.shape, keep * (1.0 - keep), device=x.device)
    )
