"""The squared kernel calibration error: calibration of the whole probability vector, without bins.

Widmann, Lindsten, Zachariah, Calibration tests in multi-class classification: A unifying framework, 2019,
https://arxiv.org/abs/1910.11385

The estimators average h_ij = exp(-TV(p_i, p_j)/ν) (e_{y_i} - p_i)ᵀ(e_{y_j} - p_j) over pairs of rows, with the total
variation distance TV = ½‖p_i - p_j‖₁. The pairwise ones take O(rows² · classes) time, in blocks of bounded memory; the
linear one takes O(rows).
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vbdl.metrics._checks import check_probs, check_probs_and_labels

_BLOCK = 1024  # rows of a block of the pair matrix: 8 MiB of float64 at a time


def _blocks(probs: Tensor):
    """Yield (slice i, slice j, TV distances between the rows of both) over the upper triangle of blocks of rows."""
    n = probs.shape[0]
    for i in range(0, n, _BLOCK):
        for j in range(i, n, _BLOCK):
            yield i, j, 0.5 * torch.cdist(probs[i : i + _BLOCK], probs[j : j + _BLOCK], p=1.0)


def median_distance(probs: Tensor) -> float:
    """The exact median total variation distance over all pairs of rows i < j, in O(rows) memory.

    A first pass counts the distances in 4096 bins; a second collects only those in the bins of the two middle ranks.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> round(vbdl.metrics.median_distance(probs), 3)
    0.4
    """
    probs = check_probs(probs)
    n = probs.shape[0]
    if n < 2:
        raise ValueError(f"a median distance needs at least two rows, there are {n}")
    n_bins, n_pairs = 4096, n * (n - 1) // 2
    ranks = ((n_pairs - 1) // 2, n_pairs // 2)

    def pairs():
        for i, j, distance in _blocks(probs):
            if i == j:
                row, column = torch.triu_indices(*distance.shape, offset=1, device=distance.device)
                yield distance[row, column]
            else:
                yield distance.reshape(-1)

    def number(d: Tensor) -> Tensor:
        return (d * n_bins).to(torch.int64).clamp_(0, n_bins - 1)

    counts = torch.zeros(n_bins, dtype=torch.int64, device=probs.device)
    for d in pairs():
        counts += torch.bincount(number(d), minlength=n_bins)
    cumulative = counts.cumsum(0)
    middle = torch.searchsorted(cumulative, torch.tensor(ranks, device=probs.device), right=True)
    low, high = int(middle[0]), int(middle[1])
    kept = []
    for d in pairs():
        b = number(d)
        kept.append(d[(b >= low) & (b <= high)])
    before = int(cumulative[low - 1]) if low else 0
    ordered = torch.cat(kept).sort().values
    return float((ordered[ranks[0] - before] + ordered[ranks[1] - before]) / 2)


def skce(probs: Tensor, y: Tensor, estimator: str = "unbiased", bandwidth: float | None = None) -> float:
    """The squared kernel calibration error.

    probs: (batch, classes), or (batch,) of class 1;  y: (batch,).
    bandwidth: ν of the kernel; by default the median distance between rows.
    estimator: "biased" (mean over all i, j, never negative), "unbiased" (mean over i ≠ j) or "linear" (mean over the
        disjoint pairs (0, 1), (2, 3), ...: unbiased with more variance, O(batch) if the bandwidth is given).
    Raises ValueError for fewer than two rows, and if the median distance is 0 and no bandwidth is given.

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> probs = logits.softmax(1)
    >>> vbdl.metrics.skce(probs, y) > 0  # overconfident
    True
    """
    probs, y = check_probs_and_labels(probs, y)
    n = probs.shape[0]
    if n < 2:
        raise ValueError(f"the kernel calibration error needs at least two rows, there are {n}")
    if bandwidth is None:
        bandwidth = median_distance(probs)
    if not bandwidth > 0:
        raise ValueError(f"the bandwidth must be positive, but is {bandwidth}: most rows are equal, pass bandwidth=")
    residual = one_hot(y, probs.shape[1]) - probs
    if estimator == "linear":
        pairs = n // 2
        a, b = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        distance = 0.5 * (probs[a] - probs[b]).abs().sum(dim=1)
        h = torch.exp(-distance / bandwidth) * (residual[a] * residual[b]).sum(dim=1)
        return float(h.mean())
    if estimator not in ("biased", "unbiased"):
        raise ValueError(f"estimator must be 'biased', 'unbiased' or 'linear', not {estimator!r}")
    total = torch.zeros((), dtype=torch.float64, device=probs.device)
    for i, j, distance in _blocks(probs):
        h = torch.exp(-distance / bandwidth) * (residual[i : i + _BLOCK] @ residual[j : j + _BLOCK].T)
        total += h.sum() if i == j else 2 * h.sum()
    if estimator == "biased":
        return float(total) / n**2
    return float(total - (residual**2).sum()) / (n * (n - 1))
