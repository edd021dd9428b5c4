"""Data sets that come with scikit-learn and need no download."""

from functools import partial
from types import ModuleType
from typing import Unpack

import numpy as np
import torch

from vbdl.bench.datasets.splits import classification, regression, stratified_splits
from vbdl.bench.networks import convolutional, mlp
from vbdl.bench.registry import dataset
from vbdl.bench.source import Source
from vbdl.bench.task import Task, TaskOptions

SPLITS = 5


def _sklearn() -> ModuleType:
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the bundled data sets need scikit-learn: pip install 'vbdl[demo]'") from error
    return datasets


def table(name: str, x: np.ndarray, y: np.ndarray, classes: tuple[str, ...], **options: Unpack[TaskOptions]) -> Task:
    """A classification task from a table, on stratified splits. x: (rows, features);  y: (rows,) class indices"""
    order, n_train = stratified_splits(y, SPLITS)
    options.setdefault("recipe", {"epochs": 60, "lr": 3e-3})
    return classification(name, x, y, order, n_train, classes=classes, network=partial(mlp, x.shape[1], 64), **options)


# name -> scikit-learn's loader, description, classes, columns if scikit-learn's names need replacement
_TABLES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "breast-cancer": (
        "load_breast_cancer",
        "biopsies, 569 rows, 30 measurements of cell nuclei: malignant or benign",
        ("malignant", "benign"),
        (),
    ),
    "iris": (
        "load_iris",
        "flowers, 150 rows, 4 measurements, 3 species",
        ("setosa", "versicolor", "virginica"),
        ("sepal length", "sepal width", "petal length", "petal width"),
    ),
    "wine-classes": (
        "load_wine",
        "Italian wines, 178 rows, 13 measurements, 3 growers",
        ("grower 1", "grower 2", "grower 3"),
        (),
    ),
}


def _table(name: str, source: Source, protocol: str = "") -> Task:
    loader, _, classes, columns = _TABLES[name]
    bunch = getattr(_sklearn(), loader)()
    return table(name, bunch.data, bunch.target, classes, columns=columns or tuple(bunch.feature_names))


for _name, (_, _about, _, _) in _TABLES.items():
    _make = partial(_table, _name)
    _make.__module__ = __name__  # type: ignore[attr-defined]
    _make.__doc__ = _about
    dataset(_name, suite="bundled")(_make)


@dataset("diabetes", suite="bundled")
def diabetes(source: Source, protocol: str = "") -> Task:
    """patients, 442 rows, 10 measurements: progression of the disease a year later, 25 to 346"""
    bunch = _sklearn().load_diabetes(scaled=False)
    orders = np.stack([np.random.RandomState(k).permutation(len(bunch.target)) for k in range(SPLITS)])
    return regression(
        "diabetes",
        bunch.data,
        bunch.target.astype(np.float64),
        orders,
        round(0.8 * len(bunch.target)),
        network=partial(mlp, 10, 50),
        columns=tuple(bunch.feature_names),
        recipe={"epochs": 60, "lr": 3e-3},
        shuffle=True,
    )


@dataset("digits", suite="bundled")
def digits(source: Source, protocol: str = "") -> Task:
    """handwritten digits, 1797 images of 8 x 8 pixels"""
    bunch = _sklearn().load_digits()
    y = bunch.target.astype(np.int64)
    order, n_train = stratified_splits(y, 1)
    x = torch.from_numpy(bunch.images.astype(np.float32))[order[0]].unsqueeze(1).unsqueeze(0) / 16
    test = x[:, n_train:]
    return Task(
        name="digits",
        x=x,
        y=torch.from_numpy(y)[order[0]].unsqueeze(0),
        n_train=n_train,
        network=partial(convolutional, 1, 8),
        classes=tuple(map(str, range(10))),
        recipe={"epochs": 30, "lr": 3e-3},
        ood={"turned by 90 degrees": test.rot90(1, (3, 4)).contiguous(), "noise": noise(test)},
        image=(255.0, 0.0),
    )


def noise(like: torch.Tensor) -> torch.Tensor:
    """Images of uniform noise in [0, 1] with the same shape."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(0))
