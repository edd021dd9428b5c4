"""A run of the suite to report on: small, with images, tables and regression, and hostile names."""

import numpy as np
import pytest
import torch

from vbdl.bench import registry
from vbdl.bench.datasets.splits import classification, standard_splits
from vbdl.bench.networks import one_hidden
from vbdl.bench.protocols import published
from vbdl.bench.runner import Suite, SuiteSettings
from vbdl.bench.source import Source

HOSTILE = "<script>alert(1)</script>"


def hostile(source, protocol):
    """<img src=x onerror=alert(2)>"""
    x = np.random.RandomState(0).randn(60, 3)
    y = (x[:, 0] > 0).astype(np.int64)
    columns = (f"a{HOSTILE}", "b\" onclick='alert(3)'", "c")
    return classification(
        "hostile",
        x,
        y,
        standard_splits(60, 3),
        40,
        classes=(HOSTILE, "</style>"),
        columns=columns,
        network=lambda p, outputs: one_hidden(3, 8, p, outputs),
        recipe={"epochs": 3},
        notes=(f"note {HOSTILE}",),
    )


def measured(source, protocol):
    """regression with published columns"""
    task = registry.DATASETS["diabetes"].make(source, protocol)
    values = tuple(0.1 * k for k in range(task.n_splits))
    object.__setattr__(task, "published", published("boston", "2016", {"ll": values, "rmse": values}))
    return task


def run(out, seed=0, effort=0.05, methods=("mc-dropout", "deep-ensemble", "linear")):
    registry.load_builtin()
    known = dict(registry.DATASETS)
    registry.DATASETS["hostile"] = registry.Entry("hostile", hostile, "own", hostile.__doc__ or "")
    registry.DATASETS["measured"] = registry.Entry("measured", measured, "own", "")
    try:
        torch.set_num_threads(1)
        sets = ("measured", "hostile", "digits")
        settings = SuiteSettings(seed, effort, 8)
        Suite(out, sets, methods, Source(), settings, lambda text: None, False, compile=False).run()
    finally:
        registry.DATASETS.clear()
        registry.DATASETS.update(known)
    return out


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """The folder of a run."""
    return run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def undertrained(tmp_path_factory):
    """The same with a tenth of the training, so that it is worse."""
    return run(tmp_path_factory.mktemp("undertrained"), effort=0.005)
