"""Histogram binning: a probability is replaced by the frequency observed in its bin.

Zadrozny, Elkan, Obtaining calibrated probability estimates from decision trees and naive Bayesian classifiers, 2001,
https://dl.acm.org/doi/10.5555/645530.655658
"""

import torch
from torch import Tensor

from vbdl.calibration._fit import binary_problems, one_versus_rest
from vbdl.types import Calibrator


class Histogram(Calibrator):
    """A map of each class's probability to the class's frequency among the calibration rows of its bin.

    It acts on the mean probability; more than two classes are calibrated one-versus-rest and normalized.

    binning: "width" (equal width, right-closed) or "mass" (equal counts, edges midway between neighboring values).
    An empty bin gives its midpoint. A frequency may be 0 or 1, so the log-likelihood can be infinite.

    >>> _ = torch.manual_seed(0)
    >>> true = torch.rand(1000)
    >>> y = torch.bernoulli(true).long()
    >>> probs = true.square()  # a curved error
    >>> method = vbdl.calibration.Histogram().fit(probs, y)
    >>> method(torch.tensor([0.25])).round(decimals=1)  # the true probability is 0.5
    tensor([0.5000])
    """

    acts_on = "probs"
    edges: Tensor | None
    values: Tensor | None

    def __init__(self, n_bins: int = 15, binning: str = "width"):
        super().__init__()
        if n_bins < 1:
            raise ValueError(f"n_bins must be at least 1, not {n_bins}")
        if binning not in ("width", "mass"):
            raise ValueError(f"binning must be 'width' or 'mass', not {binning!r}")
        self.n_bins, self.binning = n_bins, binning
        self.register_buffer("edges", None)  # (maps, bins - 1), inner edges
        self.register_buffer("values", None)  # (maps, bins)

    def extra_repr(self) -> str:
        return f"n_bins={self.n_bins}, binning={self.binning!r}"

    def fit(self, probs: Tensor, y: Tensor) -> "Histogram":
        """Fit; return self. probs: (batch, classes), or (batch,) of class 1;  y: (batch,). Every class needs a row."""
        edges, values = [], []
        for p, hit in binary_problems(probs, y, "Histogram"):
            cut = torch.arange(1, self.n_bins, device=p.device)
            if self.binning == "width":
                inner = cut.to(torch.float64) / self.n_bins
            else:
                ordered = p.sort().values
                last = (cut * p.numel() // self.n_bins).clamp(1, max(1, p.numel() - 1))
                inner = (ordered[last - 1] + ordered[last.clamp(max=p.numel() - 1)]) / 2
            number = torch.bucketize(p, inner)
            counts = torch.bincount(number, minlength=self.n_bins).to(torch.float64)
            hits = torch.bincount(number, weights=hit, minlength=self.n_bins)
            ends = torch.cat((inner.new_zeros(1), inner, inner.new_ones(1)))
            middle = (ends[1:] + ends[:-1]) / 2
            edges.append(inner)
            values.append(torch.where(counts > 0, hits / counts.clamp(min=1), middle))
        self.edges, self.values = torch.stack(edges), torch.stack(values)
        return self

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrate probabilities: (batch, classes) -> (batch, classes), or (batch,) -> (batch,)."""
        edges, values = self.edges, self.values
        if edges is None or values is None:
            raise RuntimeError("Histogram has not been fitted: call fit first")
        table = lambda p: values.gather(1, torch.searchsorted(edges, p))
        return one_versus_rest(table, values.shape[0], probs)
