"""Hints at columns that give the target away."""

import numpy as np
import pyarrow as pa
import pytest

from vbdl.tabular import TableOptions, fit_table

pytestmark = pytest.mark.usefixtures("untrained")
N = 400
RANDOM = np.random.default_rng(0)
A, B = RANDOM.normal(size=(2, N))
AMOUNT = np.exp(3 * A + B)  # no single outlier may decide
CLASS = np.where(A + 0.5 * B > 0, "yes", "no")

ONES_THAT_DO = {
    "the amount in cents": (AMOUNT, np.round(100 * AMOUNT)),
    "another unit, with gaps": (AMOUNT, np.where(np.arange(N) % 40 == 0, np.nan, 5 - 2 * AMOUNT)),
    "a curve of it": (A, 1 / (1 + np.exp(-A))),
    "far from zero": (1.7e9 + A, 60 * A),
    "the classes' codes": (CLASS, (CLASS == "yes") * 7),
    "the classes in other words": (CLASS, np.where(CLASS == "yes", "paid", "open")),
    "truth": (CLASS, CLASS == "yes"),
    "classes by a threshold": (CLASS, A + 0.5 * B),
}
ONES_THAT_DO_NOT = {
    "a good input": (A, A + 0.3 * B),
    "noise": (AMOUNT, B),
    "half of it": (CLASS, A),
    "a rare class": (np.where(np.arange(N) % 100 == 0, "rare", "often"), B),
    "a word for each half": (A, np.where(A > 0, "u", "v")),
}


def _hints(y, column):
    data = {"column": pa.array(column, from_pandas=True), "b": B, "y": y}
    found = fit_table(data, "y", TableOptions(epochs=1, n_members=1, width=4), progress=False)
    return [note for note in found.notes if "almost perfectly" in note]


@pytest.mark.parametrize("name", ONES_THAT_DO)
def test_a_column_that_says_the_target_is_named(name):
    [hint] = _hints(*ONES_THAT_DO[name])
    assert hint.startswith("column 'column' alone says y") and "--ignore column" in hint


@pytest.mark.parametrize("name", ONES_THAT_DO_NOT)
def test_other_columns_are_not(name):
    assert _hints(*ONES_THAT_DO_NOT[name]) == []


def test_none_of_many_columns_of_noise_is_named():
    data = {f"x{i}": RANDOM.normal(size=80) for i in range(300)} | {"y": np.where(RANDOM.random(80) < 0.5, "u", "v")}
    found = fit_table(data, "y", TableOptions(epochs=1, n_members=1, width=4), progress=False)
    assert not [note for note in found.notes if "almost perfectly" in note]
