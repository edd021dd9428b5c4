"""Recommendation of a method for a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vbdl.recommendation import SHARES, Recommendation, recommend
from vbdl.tabular.divided import divided_table
from vbdl.tabular.network import TabularNetwork
from vbdl.tabular.options import TableOptions
from vbdl.tabular.reading import Reading
from vbdl.tabular.schema import Schema


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
    """Call `vbdl.recommend` with the network that `fit_table` would train, on rows read and divided as there.

    data, kinds, ignore, task, group, time, reading: as for `fit_table`.
    """
    table = divided_table(
        data, target, SHARES, seed, kinds=kinds, ignore=ignore, group=group, time=time, task=task, reading=reading
    )
    schema, rows, n_train = table.schema, table.rows, len(table.rows["train"])
    settings = TableOptions(method="mc-dropout", width=width, depth=depth, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TabularNetwork(**settings.network_arguments(schema, n_train))
    likelihood = settings.likelihood(schema, n_train)
    found = recommend(network, (table.x, table.y), likelihood, budget=budget, latency=latency, rows=rows, seed=seed)
    return RecommendedForTable(found, schema, rows, table.parts.how, table.left_out, table.notes)
