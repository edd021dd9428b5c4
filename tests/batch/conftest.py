"""A small model of a table, saved, and tables to predict."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import vbdl
from vbdl.tabular import TableOptions, fit_table


def make_table(n, seed):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, n))
    word = random.choice(["u", "v", "w"], n)
    return pa.table(
        {
            "id": [f"row-{i}" for i in range(n)],
            "a": a,
            "b": [None if i % 9 == 0 else v for i, v in enumerate(b)],
            "word": word,
            "y": np.where(a + (word == "u") + 0.4 * random.normal(size=n) > 0, "yes", "no"),
        }
    )


@pytest.fixture(scope="session")
def fitted():
    settings = TableOptions(width=16, depth=1, n_members=3, epochs=8, lr=1e-2, batch_size=64)
    return fit_table(make_table(500, 0), "y", settings, ignore=("id",), progress=False)


@pytest.fixture(scope="session")
def model(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m.vbdl"
    fitted.save(folder)
    return folder


@pytest.fixture(scope="session")
def rows():
    return make_table(2_000, 1)


@pytest.fixture(scope="session")
def network():
    """An ensemble of two inputs and two classes that is traced once, not in each of many jobs."""
    torch.manual_seed(0)
    predictor = vbdl.Predictor(vbdl.DeepEnsemble(nn.Linear(2, 2), 2), vbdl.Categorical(), compile=False, tiles=(64,))
    predictor.replace = lambda **settings: predictor
    return predictor
