"""The Brier score and its decomposition.

Brier, Verification of forecasts expressed in terms of probability, 1950,
https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
Murphy, A new vector partition of the probability score, 1973,
https://doi.org/10.1175/1520-0450(1973)012<0595:ANVPOT>2.0.CO;2
Stephenson, Coelho, Jolliffe, Two extra components in the Brier score decomposition, 2008,
https://doi.org/10.1175/2007WAF2006116.1
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vbdl.metrics._bins import bin_numbers
from vbdl.metrics._checks import check_probs_and_labels


def brier_score(probs: Tensor, y: Tensor) -> Tensor:
    """The Brier score Σ_k (p_k - 1[y = k])² of each row, in [0, 2]; for two classes twice sklearn's binary score.

    probs: (batch, classes), or (batch,) of class 1;  y: (batch,)  ->  (batch,)

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> vbdl.metrics.brier_score(probs, y).round(decimals=2)
    tensor([0.0200, 1.2800, 0.3200], dtype=torch.float64)
    """
    probs, y = check_probs_and_labels(probs, y, empty=True)
    return ((probs - one_hot(y, probs.shape[1])) ** 2).sum(dim=1)


@dataclass(frozen=True)
class BrierParts:
    """The parts of the mean Brier score: brier = reliability - resolution + uncertainty + within_bin, exactly.

    reliability: squared difference of mean forecast and frequency in a bin, lower is better. resolution: squared
    difference of the bins' frequencies from the base rate, higher is better. uncertainty: variance of the labels alone.
    within_bin: variance of the forecasts inside bins minus twice their covariance with the labels; 0 if each bin holds
    a single forecast value.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> parts = vbdl.metrics.brier_decomposition(probs, y)
    >>> total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    >>> round(total, 3), round(parts.brier, 3)
    (0.54, 0.54)
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_bin: float

    def __float__(self) -> float:
        return self.brier


class BrierDecomposition:
    """A streaming decomposition of the Brier score, in equal-width bins for each class, summed over classes.

    Its state is five (classes, bins) tables: counts in int64, sums in float64.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> score = vbdl.metrics.BrierDecomposition()
    >>> score.update(probs, y)
    >>> round(score.compute().brier, 3)
    0.54
    """

    def __init__(self, n_bins: int = 10):
        if n_bins < 1:
            raise ValueError(f"n_bins must be at least 1, not {n_bins}")
        self.n_bins = n_bins
        self.reset()

    def reset(self) -> None:
        self.counts: Tensor | None = None

    def update(self, probs: Tensor, y: Tensor) -> None:
        probs, y = check_probs_and_labels(probs, y, empty=True)
        n_classes = probs.shape[1]
        if self.counts is None:
            zeros = torch.zeros(n_classes * self.n_bins, dtype=torch.int64, device=probs.device)
            self.counts, self.hits = zeros, zeros.clone()
            self.sums = zeros.to(torch.float64)
            self.squares, self.products = self.sums.clone(), self.sums.clone()
        elif self.counts.numel() != n_classes * self.n_bins:
            raise ValueError(f"earlier batches had {self.counts.numel() // self.n_bins} classes, not {n_classes}")
        cell = bin_numbers(probs, self.n_bins) + self.n_bins * torch.arange(n_classes, device=probs.device)
        cell, p = cell.reshape(-1), probs.reshape(-1)
        hit = one_hot(y, n_classes).reshape(-1)
        self.counts += torch.bincount(cell, minlength=self.counts.numel())
        self.hits.index_add_(0, cell, hit)
        self.sums.index_add_(0, cell, p)
        self.squares.index_add_(0, cell, p * p)
        self.products.index_add_(0, cell, p * hit)

    def merge(self, other: "BrierDecomposition") -> "BrierDecomposition":
        if other.n_bins != self.n_bins:
            raise ValueError(f"merge needs the same bins, got {self.n_bins} and {other.n_bins}")
        if other.counts is None:
            return self
        if self.counts is None:
            self.counts, self.hits, self.sums = other.counts.clone(), other.hits.clone(), other.sums.clone()
            self.squares, self.products = other.squares.clone(), other.products.clone()
            return self
        device = self.counts.device
        self.counts, self.hits = self.counts + other.counts.to(device), self.hits + other.hits.to(device)
        self.sums, self.squares = self.sums + other.sums.to(device), self.squares + other.squares.to(device)
        self.products = self.products + other.products.to(device)
        return self

    def compute(self) -> BrierParts:
        if self.counts is None or int(self.counts.sum()) == 0:
            raise ValueError("no rows yet: call update first")
        shape = (-1, self.n_bins)
        n_bin = self.counts.reshape(shape).to(torch.float64)
        n = n_bin.sum(dim=1)[0]
        safe = n_bin.clamp(min=1)
        hits = self.hits.reshape(shape).to(torch.float64)
        sums, squares = self.sums.reshape(shape), self.squares.reshape(shape)
        p, f = sums / safe, hits / safe
        base = hits.sum(dim=1, keepdim=True) / n
        variance = squares - sums * p
        covariance = self.products.reshape(shape) - sums * f
        return BrierParts(
            brier=float((squares - 2 * self.products.reshape(shape) + hits).sum() / n),
            reliability=float((n_bin * (p - f) ** 2).sum() / n),
            resolution=float((n_bin * (f - base) ** 2).sum() / n),
            uncertainty=float((base * (1 - base)).sum()),
            within_bin=float((variance - 2 * covariance).sum() / n),
        )


def brier_decomposition(probs: Tensor, y: Tensor, n_bins: int = 10) -> BrierParts:
    """The parts of the mean Brier score. probs: (batch, classes);  y: (batch,)

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> parts = vbdl.metrics.brier_decomposition(probs, y)
    >>> round(parts.brier, 3), round(parts.uncertainty, 3)
    (0.54, 0.444)
    """
    parts = BrierDecomposition(n_bins)
    parts.update(probs, y)
    return parts.compute()
