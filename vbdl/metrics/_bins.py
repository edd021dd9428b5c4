"""Bins of predicted probabilities, with their counts, hits and sums.

Equal-width bins are closed on the right, the first one on both sides: p = 1 lies in the last bin. Probabilities are
compared with the bin edges in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def bin_numbers(p: Tensor, n_bins: int) -> Tensor:
    """The index of each p's equal-width bin, closed on the right; p in [0, 1]. int64, the shape of p."""
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=p.device) / n_bins
    return torch.bucketize(p.contiguous(), edges)


def equal_mass_bins(p: Tensor, n_bins: int) -> Tensor:
    """The index of each p's equal-mass bin: p (batch,) -> (batch,) int64.

    The ranks are split into n_bins parts whose sizes differ by at most one; all equal values then go into the bin of
    the first of them, so that the order of the rows does not matter. With many equal values some bins stay empty.
    """
    n = p.numel()
    ordered, order = p.sort(stable=True)
    rank_bin = torch.arange(n, device=p.device) * n_bins // n
    _, group, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    first = torch.cumsum(counts, 0) - counts
    numbers = torch.empty(n, dtype=torch.int64, device=p.device)
    numbers[order] = rank_bin[first[group]]
    return numbers


def binned(p: Tensor, n_bins: int, binning: str) -> Tensor:
    """The index of each p's bin; binning: "width" (equal width) or "mass" (equal mass)."""
    if binning == "width":
        return bin_numbers(p, n_bins)
    if binning == "mass":
        return equal_mass_bins(p, n_bins)
    raise ValueError(f"binning must be 'width' or 'mass', not {binning!r}")


def check_bins(n_bins: int) -> int:
    """Return n_bins; ValueError if it is not positive."""
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, not {n_bins}")
    return n_bins


@dataclass
class Bins:
    """The rows, hits and summed probabilities in each bin: tensors (bins,)."""

    counts: Tensor  # int64
    hits: Tensor  # int64
    sums: Tensor  # float64

    @classmethod
    def of(cls, number: Tensor, p: Tensor, hit: Tensor, n_bins: int) -> "Bins":
        zeros = torch.zeros(n_bins, dtype=torch.int64, device=p.device)
        return cls(
            torch.bincount(number, minlength=n_bins),
            zeros.index_add(0, number, hit.to(torch.int64)),
            zeros.to(torch.float64).index_add(0, number, p),
        )

    def __add__(self, other: "Bins") -> "Bins":
        device = self.counts.device
        return Bins(
            self.counts + other.counts.to(device),
            self.hits + other.hits.to(device),
            self.sums + other.sums.to(device),
        )

    def gaps(self) -> Tensor:
        """|mean probability - frequency of hits| of each bin, (bins,); 0 for empty bins."""
        return ((self.sums - self.hits) / self.counts.clamp(min=1)).abs()

    def expected(self) -> float:
        """Σ n_b/n · gap_b, computed with a single division, so that exact sums give an exactly rounded result."""
        return float((self.sums - self.hits).abs().sum() / self.counts.sum())

    def debiased_square(self) -> float:
        """Σ n_b/n (gap_b² - f_b(1 - f_b)/(n_b - 1)) with the frequency f_b; bins with a single row count as 0."""
        n_bin = self.counts.to(torch.float64)
        f = self.hits / n_bin.clamp(min=1)
        terms = self.gaps() ** 2 - f * (1 - f) / (n_bin - 1).clamp(min=1)
        return float(torch.where(self.counts > 1, n_bin * terms, 0.0).sum() / n_bin.sum())
