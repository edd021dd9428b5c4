"""Make a Task from arrays: draw splits, and standardize each by its own training part."""

from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from vbdl.bench.task import Task, TaskOptions


def standard_splits(rows: int, count: int) -> np.ndarray:
    """The standard UCI splits as permutations (count, rows), whose first round(0.9 rows) entries are training rows.

    Hernandez-Lobato and Adams, Probabilistic Backpropagation, ICML 2015: numpy's generator with seed 1.
    """
    generator = np.random.RandomState(1)
    return np.stack([generator.choice(range(rows), rows, replace=False) for _ in range(count)])


def regression(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    order: np.ndarray,
    n_train: int,
    network: Callable[[float, int], nn.Module],
    shuffle: bool = False,
    **options: Unpack[TaskOptions],
) -> Task:
    """A regression task. x: (rows, features), y: (rows,), order: (splits, rows) row indices, the training part first.

    shuffle: add out-of-distribution rows as `classification` does.
    """
    inputs, targets, centers, scales = [], [], [], []
    for rows in order:
        train = rows[:n_train]
        center, scale = y[train].mean(), y[train].std()
        inputs.append(_standardized(x, rows, train))
        targets.append((y[rows] - center) / scale)
        centers.append(float(center))
        scales.append(float(scale))
    stacked = torch.from_numpy(np.stack(inputs)).float()
    return Task(
        name=name,
        x=stacked,
        y=torch.from_numpy(np.stack(targets)).float().unsqueeze(-1),
        n_train=n_train,
        network=network,
        ood={"features shuffled": shuffled(stacked[:, n_train:])} if shuffle else {},
        center=tuple(centers),
        scale=tuple(scales),
        **options,
    )


def classification(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    order: np.ndarray,
    n_train: int,
    network: Callable[[float, int], nn.Module],
    classes: Sequence[str],
    **options: Unpack[TaskOptions],
) -> Task:
    """A classification task from a table. x: (rows, features), y: (rows,) class indices, order as in `regression`.

    Its out-of-distribution rows are the test rows with each feature shuffled separately, which breaks their dependence.
    """
    inputs = torch.from_numpy(np.stack([_standardized(x, rows, rows[:n_train]) for rows in order])).float()
    targets = torch.from_numpy(np.stack([y[rows] for rows in order])).to(torch.int64)
    test = inputs[:, n_train:]
    return Task(
        name=name,
        x=inputs,
        y=targets,
        n_train=n_train,
        network=network,
        classes=tuple(classes),
        ood={"features shuffled": shuffled(test)},
        **options,
    )


def stratified_splits(y: np.ndarray, count: int, share: float = 0.8) -> tuple[np.ndarray, int]:
    """(orders (count, rows), n_train): the first n_train rows of an order have each class in its overall share."""
    from vbdl.data.splitting import split

    orders, sizes = [], set()
    for seed in range(count):
        parts = split(len(y), {"train": share, "test": 1 - share}, stratify=torch.from_numpy(y), seed=seed)
        train = parts["train"][torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(seed))]
        orders.append(torch.cat([train, parts["test"]]).numpy())
        sizes.add(len(train))
    assert len(sizes) == 1, "shares of the same rows have the same size whatever the seed"
    return np.stack(orders), sizes.pop()


def shuffled(test: Tensor) -> Tensor:
    """The rows, (splits, rows, features), with each feature's values permuted over the rows of a split."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.empty_like(test)
    for k in range(test.shape[0]):
        for j in range(test.shape[2]):
            mixed[k, :, j] = test[k, torch.randperm(test.shape[1], generator=generator), j]
    return mixed


def _standardized(x: np.ndarray, order: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The rows in this order, standardized by the training rows; constant columns (naval has two) get scale 1."""
    mean, std = x[train].mean(0), x[train].std(0)
    return (x[order] - mean) / np.where(std < 1e-12, 1.0, std)
