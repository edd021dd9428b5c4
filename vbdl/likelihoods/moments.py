"""Means and sums of squared deviations of sets, which can be merged in any order.

Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979. Not by
E[x^2] - E[x]^2, which cancels if the mean is large.
"""

import torch
from torch import Tensor

from vbdl.types import State


def wide(x: Tensor) -> Tensor:
    """Convert a tensor to float32, unless it is in float32 or better."""
    return x if x.dtype in _WIDE else x.to(torch.promote_types(x.dtype, torch.float32))


_WIDE = (torch.float32, torch.float64)  # torch takes as long to promote a dtype for the first time as for a layer


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The count (), mean (...) and sum of squared deviations (...) over the leading axis, in float32 or better."""
    x = wide(x)
    mean = x.mean(0)
    return torch.full((), float(x.shape[0]), dtype=x.dtype, device=x.device), mean, (x - mean).square().sum(0)


def merge_mean(n_a: Tensor, a: Tensor, n_b: Tensor, b: Tensor) -> Tensor:
    """The mean of the union of two sets, from their counts and means."""
    return a + (b - a) * (n_b / (n_a + n_b))


def merge_deviation(n_a: Tensor, mean_a: Tensor, a: Tensor, n_b: Tensor, mean_b: Tensor, b: Tensor) -> Tensor:
    """The sum of squared deviations of the union of two sets, from their counts, means and sums."""
    return a + b + (mean_b - mean_a).square() * (n_a * n_b / (n_a + n_b))


def merge_moments(a: State, b: State, center: str, *means: str) -> State:
    """The statistics of the union of two sets of samples.

    They are the count "n", the mean `center` with its sum of squared deviations "deviation", and further `means`.
    """
    n_a, n_b = a["n"], b["n"]
    merged = {name: merge_mean(n_a, a[name], n_b, b[name]) for name in (center, *means)}
    merged["deviation"] = merge_deviation(n_a, a[center], a["deviation"], n_b, b[center], b["deviation"])
    merged["n"] = n_a + n_b
    # in the order of a, by which compiled calls identify entries; the caller merges entries not named here
    return {name: merged[name] for name in a if name in merged}


def standard_error(n: Tensor, deviation: Tensor) -> Tensor:
    """The Monte Carlo standard error of a mean of n samples; nan for one sample."""
    return (deviation / (n - 1) / n).sqrt()


def per_row(each: Tensor) -> Tensor:
    """The sum of each row, (batch,); each: (batch, ...)."""
    return each.flatten(1).sum(1) if each.ndim > 1 else each
