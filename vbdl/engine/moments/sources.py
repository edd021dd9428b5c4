"""Rules for the sources of randomness: the random words behind dropout masks, and the noise of weights.

Noise that weights share is named by its layer number, which no other noise of a network has.
"""

import torch
from torch import Tensor

from vbdl.engine.moments.value import Correlated, KroneckerWeights, Moments, Uniform, rule


def words(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Uniform:
    """The distribution of vbdl::words: uniform 32-bit words, (rows, columns)."""
    return Uniform((rows, columns), key.device)


def keep(key: Tensor, layer: int, stream: int, rows: int, columns: int, threshold: int, first_row: int) -> Moments:
    """The moments of vbdl::keep, a dropout mask, (rows, columns)."""
    return at_least(words(key, layer, stream, rows, columns), threshold)


def normal(key: Tensor, layer: int, stream: int, rows: int, columns: int) -> Moments:
    """The moments of vbdl::normal: means 0 and variances 1, (rows, columns)."""
    return Moments(torch.zeros(rows, columns, device=key.device), torch.ones(rows, columns, device=key.device))


def kronecker_noise(
    output_vectors: Tensor, input_vectors: Tensor, std: Tensor, key: Tensor, layer: int
) -> KroneckerWeights:
    """The distribution of vbdl::kronecker_noise, (outputs, inputs)."""
    var = output_vectors.square() @ std.square() @ input_vectors.square().mT
    return KroneckerWeights(torch.zeros_like(var), var, output_vectors, std, input_vectors, ("Kronecker", layer))


def dense_noise(vectors: Tensor, std: Tensor, key: Tensor, layer: int) -> Correlated:
    """The distribution of vbdl::dense_noise, (n,)."""
    root = vectors * std
    var = root.square().sum(-1)
    return Correlated(torch.zeros_like(var), var, root, ("dense", layer))


def low_rank_noise(deviations: Tensor, key: Tensor, layer: int) -> Correlated:
    """The distribution of vbdl::low_rank_noise, (n,)."""
    var = deviations.square().sum(0)
    return Correlated(torch.zeros_like(var), var, deviations.mT, ("low rank", layer))


@rule("ge")
def at_least(x: Uniform, threshold: int) -> Moments:
    """The moments of a dropout mask, word >= threshold, which is Bernoulli(1 - threshold / 2^32)."""
    if not isinstance(x, Uniform):
        raise ValueError("moment propagation has no rule to compare random values: use estimator='sampling'")
    keep = 1.0 - threshold / 2.0**32
    return Moments(
        torch.full(x.shape, keep, device=x.device), torch.full(x.shape, keep * (1.0 - keep), device=x.device)
    )
