"""Calibration error in bins: how far stated probabilities lie from observed frequencies.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599
Kumar, Liang, Ma, Verified Uncertainty Calibration, 2019, https://arxiv.org/abs/1909.10155 (debiased)
Widmann, Lindsten, Zachariah, Calibration tests in multi-class classification, 2019, https://arxiv.org/abs/1910.11385
(all probabilities)
Roelofs, Cain, Shlens, Mozer, Mitigating Bias in Calibration Error Estimation, 2022, https://arxiv.org/abs/2012.08668
(as many bins as stay in order)

Equal-width bins are right-closed, the first one closed on both sides: p = 1 lies in the last bin. A confidence of lower
precision is compared with the edges after conversion to float64. The streams keep int64 counts and float64 sums,
O(bins).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vbdl.metrics._checks import check_probs_and_labels


def bin_numbers(p: Tensor, n_bins: int) -> Tensor:
    """Number of the equal-width right-closed bin of each p in [0, 1]: int64, the shape of p."""
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=p.device) / n_bins
    return torch.bucketize(p.contiguous(), edges)


def equal_mass_bins(p: Tensor, n_bins: int) -> Tensor:
    """Number of the equal-mass bin of each p (batch,): int64.

    Ranks are cut into n_bins parts whose sizes differ by at most one, then equal values are put together, into the
    bin of the first of them: the order of the rows cannot matter. With many equal values there are fewer bins.
    """
    n = p.numel()
    ordered, order = p.sort(stable=True)
    rank_bin = torch.arange(n, device=p.device) * n_bins // n
    _, group, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    first = torch.cumsum(counts, 0) - counts
    numbers = torch.empty(n, dtype=torch.int64, device=p.device)
    numbers[order] = rank_bin[first[group]]
    return numbers


def _check_bins(n_bins: int) -> int:
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, not {n_bins}")
    return n_bins


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows. Empty bins have NaN means."""

    counts: Tensor  # (bins,) int64
    confidence: Tensor  # (bins,) mean stated probability
    frequency: Tensor  # (bins,) observed frequency


@dataclass
class _Bins:
    """Counts, hits and summed probabilities of each bin."""

    counts: Tensor  # int64
    hits: Tensor  # int64
    sums: Tensor  # float64

    @classmethod
    def of(cls, number: Tensor, p: Tensor, hit: Tensor, n_bins: int) -> "_Bins":
        zeros = torch.zeros(n_bins, dtype=torch.int64, device=p.device)
        return cls(
            torch.bincount(number, minlength=n_bins),
            zeros.index_add(0, number, hit.to(torch.int64)),
            zeros.to(torch.float64).index_add(0, number, p),
        )

    def __add__(self, other: "_Bins") -> "_Bins":
        device = self.counts.device
        return _Bins(
            self.counts + other.counts.to(device),
            self.hits + other.hits.to(device),
            self.sums + other.sums.to(device),
        )

    def gaps(self) -> Tensor:
        """|mean probability - frequency| of each bin, 0 where it is empty."""
        return ((self.sums - self.hits) / self.counts.clamp(min=1)).abs()

    def expected(self) -> float:
        """Σ n_b/n · gap_b, with one division: exact where the sums are."""
        return float((self.sums - self.hits).abs().sum() / self.counts.sum())

    def debiased_square(self) -> float:
        """Σ n_b/n (gap_b² - f_b(1 - f_b)/(n_b - 1)); bins of one row say nothing and count as 0."""
        n_bin = self.counts.to(torch.float64)
        f = self.hits / n_bin.clamp(min=1)
        terms = self.gaps() ** 2 - f * (1 - f) / (n_bin - 1).clamp(min=1)
        return float(torch.where(self.counts > 1, n_bin * terms, 0.0).sum() / n_bin.sum())


def _top_label(probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    confidence, label = probs.max(dim=1)
    return confidence.clamp(max=1.0), label == y


def _numbers(p: Tensor, n_bins: int, binning: str) -> Tensor:
    if binning == "width":
        return bin_numbers(p, n_bins)
    if binning == "mass":
        return equal_mass_bins(p, n_bins)
    raise ValueError(f"binning must be 'width' or 'mass', not {binning!r}")


class CalibrationError:
    """Streaming calibration error of the top label in equal-width bins: ECE, MCE, the debiased L2 error.

    compute() is the ECE; max_error() the MCE; debiased() Kumar's; reliability() the diagram.
    """

    def __init__(self, n_bins: int = 15):
        self.n_bins = _check_bins(n_bins)
        self.reset()

    def reset(self) -> None:
        self._bins: _Bins | None = None

    def update(self, probs: Tensor, y: Tensor) -> None:
        """probs: (batch, classes), or (batch,) of class 1;  y: (batch,)"""
        confidence, hit = _top_label(*check_probs_and_labels(probs, y, empty=True))
        bins = _Bins.of(bin_numbers(confidence, self.n_bins), confidence, hit, self.n_bins)
        self._bins = bins if self._bins is None else self._bins + bins

    def merge(self, other: "CalibrationError") -> "CalibrationError":
        if other.n_bins != self.n_bins:
            raise ValueError(f"merge needs the same bins, got {self.n_bins} and {other.n_bins}")
        if other._bins is not None:
            self._bins = other._bins if self._bins is None else self._bins + other._bins
        return self

    def _filled(self) -> _Bins:
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


def _top_bins(probs: Tensor, y: Tensor, n_bins: int, binning: str) -> _Bins:
    confidence, hit = _top_label(*check_probs_and_labels(probs, y))
    return _Bins.of(_numbers(confidence, _check_bins(n_bins), binning), confidence, hit, n_bins)


def ece(probs: Tensor, y: Tensor, n_bins: int = 15, binning: str = "width") -> float:
    """Expected calibration error of the top label, in [0, 1].

    probs: (batch, classes), or (batch,) of class 1;  y: (batch,).  binning: "width" or "mass" (needs all rows).
    """
    return _top_bins(probs, y, n_bins, binning).expected()


def mce(probs: Tensor, y: Tensor, n_bins: int = 15, binning: str = "width") -> float:
    """Maximum calibration error: the largest gap of any bin that holds a row. Noisy where bins are small."""
    return float(_top_bins(probs, y, n_bins, binning).gaps().max())


def debiased_calibration_error(probs: Tensor, y: Tensor, n_bins: int = 15, binning: str = "mass") -> float:
    """Root of the debiased squared calibration error of the top label (Kumar et al.); 0 where it is negative."""
    return max(0.0, _top_bins(probs, y, n_bins, binning).debiased_square()) ** 0.5


def ece_sweep(probs: Tensor, y: Tensor, binning: str = "mass") -> float:
    """ECE with the most bins whose frequencies still rise with the confidence (Roelofs et al.): nothing to choose.

    From one bin upwards, up to one a row; the count before the first that breaks the order. O(batch · bins): all rows
    are needed, for a stream Rows(ece_sweep).
    """
    confidence, hit = _top_label(*check_probs_and_labels(probs, y))
    found = 0.0
    for n_bins in range(1, confidence.numel() + 1):
        bins = _Bins.of(_numbers(confidence, n_bins, binning), confidence, hit, n_bins)
        filled = bins.counts > 0
        frequency = bins.hits[filled] / bins.counts[filled].to(torch.float64)
        if bool((frequency.diff() < 0).any()):
            break
        found = bins.expected()
    return found


class ClasswiseCalibrationError:
    """Streaming class-wise ECE: mean over classes of the ECE of each class's own probability, equal width."""

    def __init__(self, n_bins: int = 15):
        self.n_bins = _check_bins(n_bins)
        self.reset()

    def reset(self) -> None:
        self._bins: _Bins | None = None
        self._n_classes = 0

    def update(self, probs: Tensor, y: Tensor) -> None:
        probs, y = check_probs_and_labels(probs, y, empty=True)
        n_classes = probs.shape[1]
        if self._bins is not None and n_classes != self._n_classes:
            raise ValueError(f"earlier batches had {self._n_classes} classes, not {n_classes}")
        self._n_classes = n_classes
        cell = bin_numbers(probs, self.n_bins) + self.n_bins * torch.arange(n_classes, device=probs.device)
        bins = _Bins.of(cell.reshape(-1), probs.reshape(-1), one_hot(y, n_classes).reshape(-1), n_classes * self.n_bins)
        self._bins = bins if self._bins is None else self._bins + bins

    def merge(self, other: "ClasswiseCalibrationError") -> "ClasswiseCalibrationError":
        if other.n_bins != self.n_bins:
            raise ValueError(f"merge needs the same bins, got {self.n_bins} and {other.n_bins}")
        if other._bins is not None:
            if self._bins is not None and self._n_classes != other._n_classes:
                raise ValueError(f"merge needs the same classes, got {self._n_classes} and {other._n_classes}")
            self._bins = other._bins if self._bins is None else self._bins + other._bins
            self._n_classes = other._n_classes
        return self

    def compute(self) -> float:
        if self._bins is None or int(self._bins.counts.sum()) == 0:
            raise ValueError("no rows yet: call update first")
        # every class has seen every row, so the mean over classes is one division by all counts
        return self._bins.expected()


def classwise_ece(probs: Tensor, y: Tensor, n_bins: int = 15, binning: str = "width") -> float:
    """Mean over classes of the calibration error of that class's probability, in [0, 1]."""
    probs, y = check_probs_and_labels(probs, y)
    _check_bins(n_bins)
    errors = [
        _Bins.of(_numbers(p, n_bins, binning), p, y == k, n_bins).expected() for k, p in enumerate(probs.T.contiguous())
    ]
    return sum(errors) / len(errors)


class JointCalibrationError:
    """Streaming calibration error of all probabilities at once (Widmann et al., ECE with total variation).

    Each of the K probabilities is cut into n_bins; a cell is a distinct K-tuple of bin numbers; the error is Σ_cells
    n_c/n · ½‖mean p - label frequencies‖₁. Memory grows with the cells that occur, not with the rows.
    """

    def __init__(self, n_bins: int = 10):
        self.n_bins = _check_bins(n_bins)
        self.reset()

    def reset(self) -> None:
        self._cells: Tensor | None = None  # (cells, classes) int64 bin numbers

    def update(self, probs: Tensor, y: Tensor) -> None:
        probs, y = check_probs_and_labels(probs, y, empty=True)
        if probs.shape[0] == 0:
            return
        difference = probs - one_hot(y, probs.shape[1])
        self._fold(bin_numbers(probs, self.n_bins), difference, probs.shape[0])

    def _fold(self, cells: Tensor, differences: Tensor, n: int) -> None:
        """Adds rows, or the cells of another accumulator: equal cells are summed."""
        if self._cells is not None:
            if self._cells.shape[1] != cells.shape[1]:
                raise ValueError(f"earlier batches had {self._cells.shape[1]} classes, not {cells.shape[1]}")
            cells = torch.cat([self._cells, cells.to(self._cells.device)])
            differences = torch.cat([self._differences, differences.to(self._cells.device)])
            n += self._n
        distinct, where = torch.unique(cells, dim=0, return_inverse=True)
        zeros = torch.zeros(distinct.shape, dtype=torch.float64, device=cells.device)
        self._cells = distinct
        self._differences = zeros.index_add(0, where, differences)
        self._n = n

    def merge(self, other: "JointCalibrationError") -> "JointCalibrationError":
        if other.n_bins != self.n_bins:
            raise ValueError(f"merge needs the same bins, got {self.n_bins} and {other.n_bins}")
        if other._cells is not None:
            self._fold(other._cells, other._differences, other._n)
        return self

    def compute(self) -> float:
        if self._cells is None:
            raise ValueError("no rows yet: call update first")
        return float(0.5 * self._differences.abs().sum() / self._n)


def joint_ece(probs: Tensor, y: Tensor, n_bins: int = 10) -> float:
    """Calibration error of all probabilities at once, in [0, 1]: see JointCalibrationError."""
    error = JointCalibrationError(n_bins)
    probs, y = check_probs_and_labels(probs, y)
    error.update(probs, y)
    return error.compute()
