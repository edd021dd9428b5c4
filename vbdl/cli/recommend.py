"""The command `vbdl recommend`."""

from dataclasses import dataclass

from vbdl.cli.table_file import TableFile, print_columns, print_rows


@dataclass(frozen=True)
class Recommend(TableFile):
    """Train a small version of every method on a table, and print which method to use, and why."""

    budget: float = 60.0
    """Approximate number of seconds for all training together."""
    latency: float | None = None
    """Most seconds that the prediction of one row may take."""
    width: int = 128
    """Number of units in each hidden layer."""
    depth: int = 2
    """Number of hidden layers."""
    seed: int = 0
    """Seed of the split, the training and the draws."""

    def __call__(self) -> None:
        import torch

        from vbdl.methods import METHODS
        from vbdl.tabular.recommending import recommend_table

        torch.set_num_threads(1)
        found = recommend_table(
            self.data, self.target, self.budget, task=self.task, ignore=self.ignore, width=self.width,
            depth=self.depth, seed=self.seed, latency=self.latency, kinds=self.kinds(), group=self.group,
            time=self.time, reading=self.reading(),
        )  # fmt: skip
        print_columns(found.schema, found.left_out)
        print_rows(found.rows, found.split, found.notes)
        print(f"\n{found.recommendation}")
        name = next(m.name for m in METHODS.values() if m.class_name == found.recommendation.method)
        print(f"to train:  vbdl fit {self.words()} --method {name}")
