"""The command `vbdl recommend`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Recommend:
    """Train a small version of every method on a table, and print which method to use, and why."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File or folder of files."""
    target: str
    """Column to predict."""
    budget: float = 60.0
    """Approximate number of seconds for all training together."""
    latency: float | None = None
    """Most seconds that the prediction of one row may take."""
    task: Literal["classification", "regression"] | None = None
    """Kind of prediction; inferred from the target's cells unless given."""
    ignore: tuple[str, ...] = ()
    """Columns to leave out."""
    numeric: tuple[str, ...] = ()
    """Columns to read as numbers."""
    categorical: tuple[str, ...] = ()
    """Columns to read as categories, for example codes made of digits."""
    date: tuple[str, ...] = ()
    """Columns of dates to read as days since 1970."""
    width: int = 128
    """Number of units in each hidden layer."""
    depth: int = 2
    """Number of hidden layers."""
    seed: int = 0
    """Seed of the split, the training and the draws."""

    def __call__(self) -> None:
        import torch

        from vbdl.methods import METHODS
        from vbdl.tabular.inference import kinds_of
        from vbdl.tabular.recommending import recommend_table

        torch.set_num_threads(1)
        kinds = kinds_of(self.numeric, self.categorical, self.date)
        recommendation = recommend_table(
            self.data,
            self.target,
            self.budget,
            self.task,
            self.ignore,
            self.width,
            self.depth,
            self.seed,
            self.latency,
            kinds,
        )
        print(recommendation)
        name = next(m.name for m in METHODS.values() if m.class_name == recommendation.method)
        print(f"to train:  vbdl fit {self.data} --target {self.target} --method {name}")
