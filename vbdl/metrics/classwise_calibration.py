"""Class-wise calibration error: the mean over classes of the calibration error of the class's probability."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vbdl.metrics._bins import Bins, bin_numbers, binned, check_bins
from vbdl.metrics._checks import check_probs_and_labels


class ClasswiseCalibrationError:
    """The streaming class-wise ECE: the mean over classes of the ECE of the class's probability, equal-width bins.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> error = vbdl.metrics.ClasswiseCalibrationError()
    >>> error.update(probs, y)
    >>> round(error.compute(), 3)
    0.433
    """

    def __init__(self, n_bins: int = 15):
        self.n_bins = check_bins(n_bins)
        self.reset()

    def reset(self) -> None:
        self._bins: Bins | None = None
        self._n_classes = 0

    def update(self, probs: Tensor, y: Tensor) -> None:
        probs, y = check_probs_and_labels(probs, y, empty=True)
        n_classes = probs.shape[1]
        if self._bins is not None and n_classes != self._n_classes:
            raise ValueError(f"earlier batches had {self._n_classes} classes, not {n_classes}")
        self._n_classes = n_classes
        cell = bin_numbers(probs, self.n_bins) + self.n_bins * torch.arange(n_classes, device=probs.device)
        bins = Bins.of(cell.reshape(-1), probs.reshape(-1), one_hot(y, n_classes).reshape(-1), n_classes * self.n_bins)
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
        # each class counts every row, so dividing by the sum of all counts averages over rows and classes
        return self._bins.expected()


def classwise_ece(probs: Tensor, y: Tensor, n_bins: int = 15, binning: str = "width") -> float:
    """The mean over classes of the ECE of the class's probability, in [0, 1]. probs: (batch, classes);  y: (batch,)

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> round(vbdl.metrics.classwise_ece(probs, y), 3)
    0.433
    """
    probs, y = check_probs_and_labels(probs, y)
    check_bins(n_bins)
    errors = [
        Bins.of(binned(p, n_bins, binning), p, y == k, n_bins).expected() for k, p in enumerate(probs.T.contiguous())
    ]
    return sum(errors) / len(errors)
