"""The command `vbdl fit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vbdl.cli.table_file import TableFile, print_columns, print_rows
from vbdl.methods import building, method_of


@dataclass(frozen=True)
class Fit(TableFile):
    """Train, calibrate and evaluate a model that predicts one column of a table from the others, and save it.

    Reads CSV, Parquet and Arrow files. Infers and prints the types of columns, encodes missing cells and categories,
    and keeps equal rows in one part of the split. `--config FILE` reads options from a TOML file.
    """

    out: Path = Path("model.vbdl")
    """Folder of the model. Its figures are written beside it, to NAME-figures."""
    method: Annotated[str, tyro.conf.arg(metavar="|".join(building()))] = "deep-ensemble"
    """Method for the uncertainty of the network's weights."""
    members: int = 5
    """Networks of an ensemble."""
    samples: int = 64
    """Draws in a prediction of the other methods."""
    width: int = 128
    """Number of units in each hidden layer."""
    depth: int = 2
    """Number of hidden layers."""
    dropout: float | None = None
    """Dropout rate; 0.1 unless given, or 0 for mean-field."""
    noise: Literal["constant", "per-row"] | None = None
    """Noise of a regression: one level, or one per row by the network; chosen by the number of rows unless given."""
    epochs: int = 500
    """Largest number of epochs; training stops earlier when the validation likelihood no longer improves."""
    batch_size: int | None = None
    """Rows per training step; chosen by the number of rows unless given."""
    lr: float | None = None
    """Learning rate; chosen by the method unless given."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    patience: int | None = None
    """Epochs without improvement after which training stops; chosen by the method unless given."""
    coverage: float = 0.9
    """Coverage of the prediction sets or intervals; 0 for none."""
    test: float = 0.1
    """Fraction of the rows for testing; validation and calibration get the same fraction each."""
    seed: int = 0
    """Seed of the split, the initialization, the order of the data and the draws."""
    threads: int = 1
    """Number of threads that torch uses; 0 leaves the choice to torch."""
    figures: bool = True
    """Draw figures of calibration and of risk against coverage."""
    overwrite: bool = False
    """Replace an existing model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        method_of(self.method)  # ValueError for an unknown name, before anything is read

    def __call__(self) -> None:
        import torch

        from vbdl.artifact.files import check_place, locate
        from vbdl.tabular import TableOptions, fit_table

        if self.threads < 0:
            raise ValueError(f"threads is 0 or more, got {self.threads}")
        if not 0 < self.test < 0.3:
            raise ValueError(f"test lies between 0 and 0.3, got {self.test}")
        if self.threads:
            torch.set_num_threads(self.threads)
        check_place(self.out, locate if self.overwrite else None)
        shares = {"train": 1 - 3 * self.test, "validation": self.test, "calibration": self.test, "test": self.test}
        settings = TableOptions(
            self.method, self.members, self.samples, self.width, self.depth, self.dropout, self.noise, self.epochs,
            self.batch_size, self.lr, self.weight_decay, self.patience, self.coverage, self.seed, shares,
        )  # fmt: skip
        fitted = fit_table(
            self.data, self.target, settings,
            kinds=self.kinds(), ignore=self.ignore,
            group=self.group, time=self.time, task=self.task, reading=self.reading(),
        )  # fmt: skip
        print_columns(fitted.schema, fitted.left_out)
        print_rows(fitted.rows, fitted.split, fitted.notes)
        print(f"{self.method}: {fitted.history.epochs} epochs in {fitted.history.seconds:.1f} s\n")
        print(fitted.evaluation)
        fitted.save(self.out, overwrite=self.overwrite)
        print(f"\nsaved to {self.out}")
        if self.figures:
            folder = self.out.with_name(f"{self.out.name.removesuffix('.vbdl')}-figures")
            try:
                from vbdl.tabular.figures import draw

                for path in draw(fitted, folder):
                    print(path)
            except ModuleNotFoundError as error:
                print(f"no figures: {error}")
