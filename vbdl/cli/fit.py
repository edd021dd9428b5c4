"""The command `vbdl fit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vbdl.methods import METHODS


@dataclass(frozen=True)
class Fit:
    """Train, calibrate and evaluate a model of one column of a table from the others, and save it.

    Reads CSV, Parquet and Arrow files. Types of columns are inferred and printed; missing cells and categories are
    handled; rows that are equal stay in one part. `--config FILE` reads options from TOML.
    """

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """File, or folder of files."""
    target: str
    """Column to predict."""
    out: Path = Path("model.vbdl")
    """Folder of the model. Its figures are written beside it, to NAME-figures."""
    method: Annotated[str, tyro.conf.arg(metavar="|".join(METHODS))] = "deep-ensemble"
    """How the uncertainty of the network's weights is described."""
    task: Literal["classification", "regression"] | None = None
    """In place of what the target's cells say."""
    ignore: tuple[str, ...] = ()
    """Columns to leave out."""
    numeric: tuple[str, ...] = ()
    """Columns to read as numbers."""
    categorical: tuple[str, ...] = ()
    """Columns to read as categories, codes made of digits for instance."""
    date: tuple[str, ...] = ()
    """Columns of dates to read as days since 1970."""
    separator: str | None = None
    """Character between the cells of CSV files; found in the first line unless given."""
    encoding: str | None = None
    """Of CSV files: utf-8 unless given, latin-1, cp1252, utf-16."""
    decimal: str | None = None
    """Mark before decimals; found in the cells unless given."""
    thousands: str | None = None
    """Mark between thousands; found in the cells unless given."""
    missing: tuple[str, ...] | None = None
    """Words that mean that a cell has no value, beside an empty one; NA N/A NaN NULL None and the like unless given."""
    date_format: str | None = None
    """How text says dates: day-first, month-first, year-first, or %d.%m.%Y and the like; found unless given."""
    group: str | None = None
    """Column whose values stay in one part each: a patient, a customer."""
    time: str | None = None
    """Column by which the parts follow each other."""
    members: int = 5
    """Networks of an ensemble."""
    draws: int = 64
    """Draws in a prediction of the other methods."""
    width: int = 128
    """Units of a hidden layer."""
    depth: int = 2
    """Hidden layers."""
    dropout: float | None = None
    """Rate of dropout; 0.1 unless given, 0 for mean-field."""
    noise: Literal["constant", "per-row"] | None = None
    """Of a regression: one noise level, or one that the network predicts; by the number of rows unless given."""
    epochs: int = 500
    """At most: training stops when the validation rows no longer gain."""
    batch_size: int | None = None
    """Rows of a training step; by the number of rows unless given."""
    lr: float | None = None
    """Learning rate; by method unless given."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    patience: int | None = None
    """Epochs without a gain until training stops; by method unless given."""
    coverage: float = 0.9
    """Of the prediction sets or intervals; 0 for none."""
    test: float = 0.1
    """Share of the rows to evaluate on; as much again stops the training, and calibrates."""
    seed: int = 0
    """Of the split, the initialization, the order of training and the draws."""
    threads: int = 1
    """Threads of torch; 0 leaves the choice to torch."""
    figures: bool = True
    """Draw how good the model is."""
    overwrite: bool = False
    """Replace a model that is there."""

    def __call__(self) -> None:
        import torch

        from vbdl.artifact.files import check_place, locate
        from vbdl.tabular import TableOptions, fit_table
        from vbdl.tabular.inference import kinds_of

        if self.threads < 0:
            raise ValueError(f"threads is 0 or more, got {self.threads}")
        if not 0 < self.test < 0.3:
            raise ValueError(f"test lies between 0 and 0.3, got {self.test}")
        if self.threads:
            torch.set_num_threads(self.threads)
        check_place(self.out, locate if self.overwrite else None)
        shares = {"train": 1 - 3 * self.test, "validation": self.test, "calibration": self.test, "test": self.test}
        settings = TableOptions(
            self.method, self.members, self.draws, self.width, self.depth, self.dropout, self.noise, self.epochs,
            self.batch_size, self.lr, self.weight_decay, self.patience, self.coverage, self.seed, shares,
        )  # fmt: skip
        found = fit_table(
            self.data, self.target, settings,
            kinds=kinds_of(self.numeric, self.categorical, self.date), ignore=self.ignore,
            group=self.group, time=self.time, task=self.task, reading=self._reading(),
        )  # fmt: skip
        print(found.schema)
        for name, reason in found.left_out.items():
            print(f"  {name:24s} {'left out':12s} {reason}")
        parts = ", ".join(f"{len(rows)} {name}" for name, rows in found.rows.items())
        print(f"rows:   {parts}; {found.split}")
        for note in found.notes:
            print(f"note:   {note}")
        print(f"{self.method}: {found.history.epochs} epochs in {found.history.seconds:.1f} s\n")
        print(found.evaluation)
        found.save(self.out, overwrite=self.overwrite)
        print(f"\nsaved to {self.out}")
        if self.figures:
            folder = self.out.with_name(f"{self.out.name.removesuffix('.vbdl')}-figures")
            try:
                from vbdl.tabular.figures import draw

                for path in draw(found, folder):
                    print(path)
            except ModuleNotFoundError as error:
                print(f"no figures: {error}")

    def _reading(self) -> Any:
        from vbdl.tabular.reading import NULLS, Reading

        missing = tuple(NULLS) if self.missing is None else self.missing
        separator = "\t" if self.separator in ("\\t", "tab") else self.separator
        return Reading(
            separator=separator, encoding=self.encoding, decimal=self.decimal, thousands=self.thousands,
            missing=missing, date_format=self.date_format,
        )  # fmt: skip
