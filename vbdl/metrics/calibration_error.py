"""Calibration error of the top label: the difference of confidence and accuracy, in bins of the confidence.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599
Kumar, Liang, Ma, Verified Uncertainty Calibration, 2019, https://arxiv.org/abs/1909.10155 (debiased)
Roelofs, Cain, Shlens, Mozer, Mitigating Bias in Calibration Error Estimation, 2022, https://arxiv.org/abs/2012.08668
(the largest number of bins whose frequencies increase)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.metrics._bins import Bins, bin_numbers, binned, check_bins
from vbdl.metrics._checks import check_probs_and_labels


@dataclass(frozen=True)
class Reliability:
    """The values of a reliability diagram; NaN for empty bins.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> error = vbdl.metrics.CalibrationError(n_bins=2)
    >>> error.update(probs, y)
    >>> diagram = error.reliability()
    >>> diagram.counts, diagram.frequency.round(decimals=2)
    (tensor([0, 3]), tensor([   nan, 0.6700], dtype=torch.float64))
    """

    counts: Tensor  # (bins,) int64, rows
    confidence: Tensor  # (bins,) mean predicted probability
    frequency: Tensor  # (bins,) observed frequency


def _top_label(probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    confidence, label = probs.max(dim=1)
    return confidence.clamp(max=1.0), label == y


class CalibrationError:
    """The streaming calibration error of the top label in equal-width bins.

    compute() returns the expected calibration error (ECE), max_error() the maximum (MCE), debiased() the debiased L2
    error of Kumar et al., reliability() the diagram. The state is int64 counts and float64 sums, O(bins).

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> error = vbdl.metrics.CalibrationError(n_bins=10)
    >>> error.update(probs[:2], y[:2])
    >>> error.update(probs[2:], y[2:])
    >>> round(error.compute(), 3), round(error.max_error(), 3)
    (0.367, 0.4)
    """

    def __init__(self, n_bins: int = 15):
        self.n_bins = check_bins(n_bins)
        self.reset()

    def reset(self) -> None:
        self._bins: Bins | None = None

    def update(self, probs: Tensor, y: Tensor) -> None:
        """Add a batch. probs: (batch, classes), or (batch,) of class 1;  y: (batch,)"""
        confidence, hit = _top_label(*check_probs_and_labels(probs, y, empty=True))
        bins = Bins.of(bin_numbers(confidence, self.n_bins), confidence, hit, self.n_bins)
        self._bins = bins if self._bins is None else self._bins + bins

    def merge(self, other: "CalibrationError") -> "CalibrationError":
        if other.n_bins != self.n_bins:
            raise ValueError(f"merge needs the same bins, got {self.n_bins} and {other.n_bins}")
        if other._bins is not None:
            self._bins = other._bins if self._bins is None else self._bins + other._bins
        return self

    def _filled(self) -> Bins:
        if self._bins is None or int(self._bins.counts.sum()) == 0:
            raise ValueError("no rows yet: call update first")
        return self._bins

    def compute(self) -> float:
        return self._filled().expected()

    def max_error(self) -> float:
        return float(self._filled().gaps().max())

    def debiased(self) -> float:
        return max(0.0, self._filled().debiased_square()) ** 0.5

    def reliability(self) -> Reliability:
        bins = self._filled()
        counts = bins.counts.to(torch.float64)  # 0/0 is the NaN of an empty bin
        return Reliability(bins.counts, bins.sums / counts, bins.hits / counts)


def _top_bins(probs: Tensor, y: Tensor, n_bins: int, binning: str) -> Bins:
    confidence, hit = _top_label(*check_probs_and_labels(probs, y))
    return Bins.of(binned(confidence, check_bins(n_bins), binning), confidence, hit, n_bins)


def ece(probs: Tensor, y: Tensor, n_bins: int = 15, binning: str = "width") -> float:
    """The expected calibration error of the top label, in [0, 1].

    probs: (batch, classes), or (batch,) of class 1;  y: (batch,).  binning: "width" (equal width) or "mass" (equal
    mass).

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> round(vbdl.metrics.ece(probs, y, n_bins=10), 3)
    0.367
    """
    return _top_bins(probs, y, n_bins, binning).expected()


def mce(probs: Tensor, y: Tensor, n_bins: int = 15, binning: str = "width") -> float:
    """The maximum calibration error: the largest gap of a bin that is not empty. It is noisy for bins of few rows.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> round(vbdl.metrics.mce(probs, y, n_bins=10), 3)
    0.4
    """
    return float(_top_bins(probs, y, n_bins, binning).gaps().max())


def debiased_calibration_error(probs: Tensor, y: Tensor, n_bins: int = 15, binning: str = "mass") -> float:
    """The root of the debiased squared calibration error of the top label (Kumar et al.); 0 if that is negative.

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> probs = logits.softmax(1)
    >>> round(vbdl.metrics.debiased_calibration_error(probs, y), 2)
    0.14
    """
    return max(0.0, _top_bins(probs, y, n_bins, binning).debiased_square()) ** 0.5


def ece_sweep(probs: Tensor, y: Tensor, binning: str = "mass") -> float:
    """The ECE with the largest number of bins whose frequencies increase with the confidence (Roelofs et al.).

    Numbers of bins are tried from one upwards to one per row, until one breaks the order. O(batch · bins) time. All
    rows are needed at once: for a stream use Rows(ece_sweep).

    >>> _ = torch.manual_seed(0)
    >>> logits = 3 * torch.randn(500, 3)  # too large by a factor of two
    >>> y = torch.distributions.Categorical(logits=logits / 2).sample()
    >>> probs = logits.softmax(1)
    >>> round(vbdl.metrics.ece_sweep(probs, y), 2)
    0.14
    """
    confidence, hit = _top_label(*check_probs_and_labels(probs, y))
    error = 0.0
    for n_bins in range(1, confidence.numel() + 1):
        bins = Bins.of(binned(confidence, n_bins, binning), confidence, hit, n_bins)
        filled = bins.counts > 0
        frequency = bins.hits[filled] / bins.counts[filled].to(torch.float64)
        if bool((frequency.diff() < 0).any()):
            break
        error = bins.expected()
    return error
