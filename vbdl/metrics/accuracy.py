"""Accuracy and root mean squared error."""

import math

import torch
from torch import Tensor

from vbdl.metrics._checks import check_probs_and_labels, check_targets
from vbdl.metrics.estimate import Interval, proportion_interval


def correct(probs: Tensor, y: Tensor) -> Tensor:
    """1.0 for each row whose most probable class (the first, if several are) is the true one, else 0.0.

    probs: (batch, classes), or (batch,) of class 1;  y: (batch,)  ->  (batch,) float64

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> vbdl.metrics.correct(probs, y)
    tensor([1., 0., 1.], dtype=torch.float64)
    """
    probs, y = check_probs_and_labels(probs, y, empty=True)
    return (probs.argmax(dim=1) == y).to(torch.float64)


def accuracy(probs: Tensor, y: Tensor) -> float:
    """The share of rows whose most probable class is the true one; ValueError if there are no rows.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> round(vbdl.metrics.accuracy(probs, y), 3)
    0.667
    """
    hits = correct(probs, y)
    if hits.numel() == 0:
        raise ValueError("probs has no rows")
    return float(hits.mean())


def accuracy_interval(probs: Tensor, y: Tensor, level: float = 0.95) -> Interval:
    """The accuracy with its exact binomial (Clopper-Pearson) interval.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])
    >>> y = torch.tensor([0, 1, 1])
    >>> found = vbdl.metrics.accuracy_interval(probs, y)
    >>> round(found.lower, 2), round(found.upper, 2)
    (0.09, 0.99)
    """
    hits = correct(probs, y)
    return proportion_interval(int(hits.sum()), hits.numel(), level)


def squared_error(mean: Tensor, y: Tensor) -> Tensor:
    """(y - mean)² of each row, averaged over outputs, in squared units of the target.

    mean, y: (batch,) or (batch, outputs)  ->  (batch,)

    >>> vbdl.metrics.squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor([0., 4.], dtype=torch.float64)
    """
    mean, y = check_targets(mean, y)
    return ((y - mean) ** 2).reshape(mean.shape[0], -1).mean(dim=1)


def rmse(mean: Tensor, y: Tensor) -> float:
    """The root mean squared error over rows and outputs, in units of the target; ValueError if there are no rows.

    >>> round(vbdl.metrics.rmse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])), 3)
    1.414
    """
    errors = squared_error(mean, y)
    if errors.numel() == 0:
        raise ValueError("mean has no rows")
    return math.sqrt(float(errors.mean()))
