"""Detection of columns that give the target away, because they may be known only after the predicted event."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vbdl.tabular.columns import Categorical, Column

_LEAST = 20  # smallest number of rows to judge by
_WRONG = 5  # smallest number of rows that the simplest guess has wrong
_MOST = 4_000  # largest number of rows that are used
_LEFT = 0.02  # largest error, as a fraction of the simplest guess's, of a column that almost determines the target


def giveaways(columns: Sequence[Column], x: Tensor, y: Tensor, seed: int = 0) -> dict[str, float]:
    """Return {column: explained share of the target} of the columns that alone determine the target almost perfectly.

    x: encoded rows; y: (rows,) classes or (rows, 1) numbers. A guess is learned on one half of the rows and scored on
    the other: accuracy above that of the most frequent class, or R² of the targets' ranks; 1 is perfect.
    """
    y = y.flatten()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:_MOST]
    truth = y[order].numpy()
    classes = not y.is_floating_point()
    if not classes:  # in ranks no heavy tail outweighs the other rows
        truth = np.unique(truth, return_inverse=True)[1].astype(np.float64)
    shares, at = {}, 0
    for column in columns:
        block = x[order, at : at + len(column.features)].numpy()
        at += len(column.features)
        if isinstance(column, Categorical):
            left = _left(block.argmax(1).astype(np.float64), truth, classes)
        else:  # use the rows whose cell is not missing
            there = block[:, 1] == 0 if column.indicator else np.ones(len(block), dtype=bool)
            left = _left(block[there, 0].astype(np.float64), truth[there], classes)
        if left is not None and left <= _LEFT:
            shares[column.name] = 1 - left
    return shares


def _left(value: np.ndarray, truth: np.ndarray, classes: bool) -> float | None:
    """Return the error of a guess from these values, learned on one half of the rows and scored on the other.

    The error is a fraction of the simplest guess's error. None if there are too few rows or errors to judge.
    """
    half = len(truth) // 2
    if half < _LEAST:
        return None
    learned, judged = truth[:half], truth[half:]
    error = _error(judged, np.full(len(judged), _simplest(learned, classes)), classes)
    if error == 0 or (classes and error * len(judged) < _WRONG):
        return None
    return _error(judged, _guessed(value[:half], learned, value[half:], classes), classes) / error


def _simplest(y: np.ndarray, classes: bool) -> float:
    return float(np.bincount(y).argmax() if classes else y.mean())


def _error(truth: np.ndarray, guess: np.ndarray, classes: bool) -> float:
    return float((truth != guess).mean() if classes else np.square(truth - guess).mean())


def _guessed(known: np.ndarray, y: np.ndarray, asked: np.ndarray, classes: bool) -> np.ndarray:
    """Guess the targets at `asked`: the most frequent class of the nearest known value, or interpolated means."""
    values, place = np.unique(known, return_inverse=True)
    if not classes:
        return np.interp(asked, values, np.bincount(place, y) / np.bincount(place))
    counts = np.zeros((len(values), int(y.max()) + 1))
    np.add.at(counts, (place, y), 1)
    after = np.searchsorted(values, asked).clip(1, max(len(values) - 1, 1))
    before = after - 1
    after = after.clip(max=len(values) - 1)
    nearer = np.where(np.abs(asked - values[before]) <= np.abs(values[after] - asked), before, after)
    return counts[nearer].argmax(1)
