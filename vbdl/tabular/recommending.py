"""Recommendation of a method for a table."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vbdl.recommendation import Recommendation, recommend
from vbdl.tabular.inference import infer, training_table
from vbdl.tabular.network import TabularNetwork
from vbdl.tabular.options import TableOptions
from vbdl.tabular.target import has_target


def recommend_table(
    data: object,
    target: str,
    budget: float = 60.0,
    task: str | None = None,
    ignore: Sequence[str] = (),
    width: int = 128,
    depth: int = 2,
    seed: int = 0,
    latency: float | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Recommendation:
    """Call `vbdl.recommend` with the network that `fit_table` would train.

    Columns are standardized by all rows instead of training rows, which reveals nothing about the targets.
    """
    table, reading = training_table(data, None, kinds, [])
    if target not in table.column_names:
        raise ValueError(f"there is no column {target!r} to predict; there are {table.column_names}")
    table = table.take(np.flatnonzero(has_target(table.column(target), reading.missing)))
    schema, _ = infer(table, target, kinds=kinds, task=task, ignore=ignore, reading=reading)
    encoded = schema.encode(table)
    y, known = schema.target.encode(table.column(target))
    rows = encoded.kept & known
    settings = TableOptions(method="mc-dropout", width=width, depth=depth, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TabularNetwork(**settings.network_arguments(schema, len(y)))
    likelihood = settings.likelihood(schema, len(y))
    data = (encoded.x[rows], y[rows])
    return recommend(network, data, likelihood, budget=budget, latency=latency, seed=seed)
