"""Means and squared deviations that can be added up in any order.

Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979. Never
E[x^2] - E[x]^2, which loses everything when the mean is large.
"""

import torch
from torch import Tensor

from vbdl.types import State


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), mean (...) and summed squared deviation (...) over the leading axis, float32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(0)
    return torch.full((), float(x.shape[0]), dtype=x.dtype, device=x.device), mean, (x - mean).square().sum(0)


def merge_mean(n_a: Tensor, a: Tensor, n_b: Tensor, b: Tensor) -> Tensor:
    """Mean of the union of two sets."""
    return a + (b - a) * (n_b / (n_a + n_b))


def merge_deviation(n_a: Tensor, mean_a: Tensor, a: Tensor, n_b: Tensor, mean_b: Tensor, b: Tensor) -> Tensor:
    """Summed squared deviation of the union of two sets."""
    return a + b + (mean_b - mean_a).square() * (n_a * n_b / (n_a + n_b))


def merge_moments(a: State, b: State, center: str, *means: str) -> State:
    """Running sums of the union of two sets: the count "n", the mean `center` with its "deviation", further means."""
    n_a, n_b = a["n"], b["n"]
    merged = {name: merge_mean(n_a, a[name], n_b, b[name]) for name in (center, *means)}
    merged["deviation"] = merge_deviation(n_a, a[center], a["deviation"], n_b, b[center], b["deviation"])
    merged["n"] = n_a + n_b
    # in the order they came, by which compiled calls know them; what is not named here is merged by the caller
    return {name: merged[name] for name in a if name in merged}


def standard_error(n: Tensor, deviation: Tensor) -> Tensor:
    """Monte Carlo standard error of a mean; nan for one sample, which says nothing about its own error."""
    return (deviation / (n - 1) / n).sqrt()


def per_row(each: Tensor) -> Tensor:
    """(batch, ...) summed over everything but the batch."""
    return each.flatten(1).sum(1) if each.ndim > 1 else each
