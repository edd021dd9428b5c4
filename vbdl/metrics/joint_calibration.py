"""Calibration error of the whole probability vector.

Widmann, Lindsten, Zachariah, Calibration tests in multi-class classification, 2019, https://arxiv.org/abs/1910.11385
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vbdl.metrics._bins import bin_numbers, check_bins
from vbdl.metrics._checks import check_probs_and_labels


class JointCalibrationError:
    """The streaming calibration error of the whole probability vector (Widmann et al., ECE with total variation).

    Each of the K probabilities is assigned to one of n_bins bins; a cell is a K-tuple of bin indices. The error is
    Σ_cells n_c/n · ½‖mean p - label frequencies‖₁. Memory grows with the number of occupied cells, not of rows.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> error = vbdl.metrics.JointCalibrationError()
    >>> error.update(probs, y)
    >>> round(error.compute(), 3)
    0.433
    """

    def __init__(self, n_bins: int = 10):
        self.n_bins = check_bins(n_bins)
        self.reset()

    def reset(self) -> None:
        self._cells: Tensor | None = None  # (cells, classes) int64 bin indices

    def update(self, probs: Tensor, y: Tensor) -> None:
        probs, y = check_probs_and_labels(probs, y, empty=True)
        if probs.shape[0] == 0:
            return
        difference = probs - one_hot(y, probs.shape[1])
        self._fold(bin_numbers(probs, self.n_bins), difference, probs.shape[0])

    def _fold(self, cells: Tensor, differences: Tensor, n: int) -> None:
        """Add rows or the cells of another accumulator; equal cells are summed."""
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
    """The calibration error of the whole probability vector, in [0, 1]; see JointCalibrationError.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> round(vbdl.metrics.joint_ece(probs, y), 3)
    0.433
    """
    error = JointCalibrationError(n_bins)
    probs, y = check_probs_and_labels(probs, y)
    error.update(probs, y)
    return error.compute()
