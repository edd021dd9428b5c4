"""Data sets of medicine and credit, read from csv.gz files."""

import csv
import gzip
from pathlib import Path

import numpy as np
import torch

from vbdl.bench.datasets.bundled import table
from vbdl.bench.registry import dataset
from vbdl.bench.source import Source
from vbdl.bench.task import Task


def read(file: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Read (column names, inputs (rows, columns), targets (rows,) 0 or 1); text columns are one-hot encoded."""
    with gzip.open(file, "rt") as stream:
        header, *rows = csv.reader(stream)
    *columns, target = zip(*rows, strict=True)
    names, values = [], []
    for name, column in zip(header[:-1], columns, strict=True):
        try:
            values.append(np.array(column, dtype=np.float64))
            names.append(name)
        except ValueError:
            for level in sorted(set(column)):
                values.append((np.array(column) == level).astype(np.float64))
                names.append(f"{name} = {level}")
    return names, np.stack(values, axis=1), np.array(target).astype(float).astype(np.int64)


def _load(source: Source, path: str, name: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    file = source.find(path)
    if file is None:
        raise source.missing(name, path)
    return read(file)


@dataset("pima", suite="medical")
def pima(source: Source, protocol: str = "") -> Task:
    """diabetes among women of the Pima, 768 rows, 8 measurements"""
    names, x, y = _load(source, "medical_tabular/pima_diabetes.csv.gz", "pima")
    # in these columns 0 means missing: replace it by the median, and add an indicator column if there are many
    for column in ("glucose", "blood_pressure", "skin_thickness", "insulin", "bmi"):
        j = names.index(column)
        gone = x[:, j] == 0
        x[gone, j] = np.median(x[~gone, j])
        if gone.mean() > 0.1:
            x = np.column_stack([x, gone])
            names.append(f"{column} missing")
    notes = ("missing values are the median over all rows, test rows among them",)
    return table("pima", x, y, ("healthy", "diabetes"), columns=tuple(names), notes=notes)


@dataset("retinopathy", suite="medical")
def retinopathy(source: Source, protocol: str = "") -> Task:
    """diabetic retinopathy from features of Messidor images, 1,151 rows, 19 features"""
    names, x, y = _load(source, "medical_tabular/diabetic_retinopathy_debrecen.csv.gz", "retinopathy")
    return table("retinopathy", x, y, ("no sign", "retinopathy"), columns=tuple(names))


@dataset("german-credit", suite="credit")
def german_credit(source: Source, protocol: str = "") -> Task:
    """loans, 1,000 rows; accepting a bad one costs 5, rejecting a good one 1"""
    names, x, y = _load(source, "finance/german_credit.csv.gz", "german-credit")
    cost = torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    return table(
        "german-credit",
        x,
        y,
        ("good", "bad"),
        columns=tuple(names),
        cost=cost,
        recipe={"epochs": 20, "lr": 1e-3, "weight_decay": 1e-2},
    )
