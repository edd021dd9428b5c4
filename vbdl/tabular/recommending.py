"""Recommendation of a method for a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vbdl.recommendation import SHARES, Recommendation, recommend
from vbdl.tabular.inference import infer, training_table
from vbdl.tabular.network import TabularNetwork
from vbdl.tabular.options import TableOptions
from vbdl.tabular.parts import divide_table
from vbdl.tabular.reading import Reading
from vbdl.tabular.schema import Schema
from vbdl.tabular.target import has_target


@dataclass(frozen=True)
class RecommendedForTable:
    """A recommendation, and how the table was read and divided for it.

    rows: row numbers of each part among the rows with a target. split: how they were divided, in words. left_out: the
    reason for each column that is no input. notes: sentences for the user.
    """

    recommendation: Recommendation
    schema: Schema
    rows: Mapping[str, Tensor]
    split: str
    left_out: Mapping[str, str]
    notes: list[str] = field(default_factory=list)


def recommend_table(
    data: object,
    target: str,
    budget: float = 60.0,
    *,
    task: str | None = None,
    ignore: Sequence[str] = (),
    width: int = 128,
    depth: int = 2,
    seed: int = 0,
    latency: float | None = None,
    kinds: Mapping[str, str] | None = None,
    group: str | None = None,
    time: str | None = None,
    reading: Reading | None = None,
) -> RecommendedForTable:
    """Call `vbdl.recommend` with the network that `fit_table` would train, on rows divided as there.

    data, kinds, ignore, task, group, time, reading: as for `fit_table`.
    """
    notes: list[str] = []
    table, reading = training_table(data, reading, kinds, notes)
    if target not in table.column_names:
        raise ValueError(f"there is no column {target!r} to predict; there are {table.column_names}")
    table = table.take(np.flatnonzero(has_target(table.column(target), reading.missing)))
    ignore = (*ignore, *(name for name in (group, time) if name is not None and name not in (kinds or {})))
    parts = divide_table(table, target, task, ignore, SHARES, group, time, seed, reading)
    train = parts.rows["train"].numpy()
    schema, left_out = infer(table, target, train, kinds, ignore, task, reading, notes)
    encoded = schema.encode(table)
    y, known = schema.target.encode(table.column(target))
    usable = encoded.kept & known
    rows = {name: chosen[usable[chosen]] for name, chosen in parts.rows.items()}
    n_train = len(rows["train"])
    settings = TableOptions(method="mc-dropout", width=width, depth=depth, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TabularNetwork(**settings.network_arguments(schema, n_train))
    likelihood = settings.likelihood(schema, n_train)
    found = recommend(network, (encoded.x, y), likelihood, budget=budget, latency=latency, rows=rows, seed=seed)
    return RecommendedForTable(found, schema, rows, parts.how, left_out, [*notes, *parts.notes])
