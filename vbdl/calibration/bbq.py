"""Bayesian binning into quantiles: an average over equal-mass histograms, weighted by their evidence.

Naeini, Cooper, Hauskrecht, Obtaining Well Calibrated Probabilities Using Bayesian Binning, 2015,
https://ojs.aaai.org/index.php/AAAI/article/view/9602
"""

import math

import numpy as np
import torch
from scipy.special import betaln, logsumexp
from torch import Tensor

from vbdl.calibration._fit import binary_problems, one_versus_rest, stack_padded
from vbdl.types import Calibrator

_PRIOR_ROWS = 2.0  # N' of the paper: the weight of the prior in rows, divided among the bins


def _average_of_histograms(p: np.ndarray, hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inner edges, values) of the piecewise constant average of the histograms with all numbers of bins."""
    n = len(p)
    order = np.argsort(p, kind="stable")
    ordered, cumulative = p[order], np.concatenate(([0.0], np.cumsum(hit[order])))
    # the paper's range of bins is n^(1/3) / 10 to 10 n^(1/3); here no more bins than rows
    most = max(1, min(n, math.ceil(10 * n ** (1 / 3))))
    models = []
    for bins in range(max(1, math.floor(n ** (1 / 3) / 10)), most + 1):
        cut = np.arange(1, bins) * n // bins
        edges = np.unique((ordered[cut - 1] + ordered[cut]) / 2)
        # equal probabilities must share a bin, so counts are computed from the edges, not the cuts
        position = np.concatenate(([0], np.searchsorted(ordered, edges, side="right"), [n]))
        rows, hits = np.diff(position), np.diff(cumulative[position])
        ends = np.concatenate(([0.0], edges, [1.0]))
        prior = _PRIOR_ROWS / len(rows)
        alpha = np.clip(prior * (ends[1:] + ends[:-1]) / 2, 1e-9, prior - 1e-9)
        evidence = (betaln(hits + alpha, rows - hits + prior - alpha) - betaln(alpha, prior - alpha)).sum()
        models.append((evidence, edges, (hits + alpha) / (rows + prior)))
    log_weights = np.array([m[0] for m in models])
    weights = np.exp(log_weights - logsumexp(log_weights))
    # models with negligible weight are dropped to keep the table short
    models = [(w, e, v) for w, (_, e, v) in zip(weights, models, strict=True) if w > 1e-15]
    total = sum(w for w, _, _ in models)
    union = np.unique(np.concatenate([e for _, e, _ in models]))
    # pieces are right-closed, so looking up an edge finds the piece that ends there
    inside = np.concatenate((union, [1.0]))
    values = sum(w / total * v[np.searchsorted(e, inside)] for w, e, v in models)
    return union, np.asarray(values)


class BBQ(Calibrator):
    """A Bayesian model average of equal-mass histograms, stored as one table; its probabilities are never 0 or 1.

    It acts on the mean probability; more than two classes are calibrated one-versus-rest and normalized.

    >>> _ = torch.manual_seed(0)
    >>> true = torch.rand(1000)
    >>> y = torch.bernoulli(true).long()
    >>> probs = true.square()  # a curved error
    >>> method = vbdl.calibration.BBQ().fit(probs, y)
    >>> method(torch.tensor([0.25])).round(decimals=1)  # the true probability is 0.5
    tensor([0.4000])
    """

    acts_on = "probs"
    edges: Tensor | None
    values: Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", None)  # (maps, pieces - 1), padded with the last one
        self.register_buffer("values", None)  # (maps, pieces)

    def fit(self, probs: Tensor, y: Tensor) -> "BBQ":
        """Fit; return self. probs: (batch, classes), or (batch,) of class 1;  y: (batch,). Every class needs a row."""
        edges, values = [], []
        for p, hit in binary_problems(probs, y, "BBQ"):
            e, v = _average_of_histograms(p.cpu().numpy(), hit.cpu().numpy())
            # an edge at 1 separates nothing; it lets an empty list of edges be padded
            edges.append(torch.from_numpy(np.append(e, 1.0)).to(p.device))
            values.append(torch.from_numpy(np.append(v, v[-1])).to(p.device))
        self.edges, self.values = stack_padded(edges), stack_padded(values)
        return self

    def forward(self, probs: Tensor) -> Tensor:
        """Calibrate probabilities: (batch, classes) -> (batch, classes), or (batch,) -> (batch,)."""
        edges, values = self.edges, self.values
        if edges is None or values is None:
            raise RuntimeError("BBQ has not been fitted: call fit first")
        table = lambda p: values.gather(1, torch.searchsorted(edges, p))
        return one_versus_rest(table, values.shape[0], probs)
