"""`fit_table` trains, calibrates and evaluates a predictor of one column of a table."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vbdl.data.fingerprint import fingerprints
from vbdl.engine.predictor import Predictor
from vbdl.tabular.calibrating import CalibrationRows, calibrate_by_default, unseen_rows
from vbdl.tabular.cells import decoded, is_text
from vbdl.tabular.evaluation import Baseline, Evaluation, evaluate
from vbdl.tabular.giveaways import giveaways
from vbdl.tabular.inference import infer, training_table
from vbdl.tabular.network import NetworkArguments, TabularNetwork
from vbdl.tabular.options import TableOptions
from vbdl.tabular.parts import Parts, divide_table, joined
from vbdl.tabular.reading import ArrowColumn, Reading, arrow
from vbdl.tabular.schema import KEY, Schema
from vbdl.tabular.target import has_target
from vbdl.training.fit import History, fit

ARCHITECTURE = "vbdl.tabular.network:TabularNetwork"
_MIN_ROWS = 40


@dataclass
class Fitted:
    """The result of `fit_table`: a calibrated predictor with its schema and its evaluation.

    predictor: the calibrated predictor. rows: row numbers of each part in the table. base: the training rows' class
    shares, or mean and std. test: encoded test rows and their targets. notes: sentences for the user.
    """

    predictor: Predictor
    schema: Schema
    settings: TableOptions
    evaluation: Evaluation
    history: History
    rows: dict[str, Tensor]
    split: str
    left_out: dict[str, str]
    base: Baseline
    network: NetworkArguments
    test: tuple[Tensor, Tensor]
    notes: list[str] = field(default_factory=list)
    time: str | None = None  # the column by which the rows were divided

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Save the predictor as an artifact that holds the schema of the table; `vbdl.load` reads it."""
        self.predictor.save(
            folder,
            example=self.schema.example(),
            architecture=ARCHITECTURE,
            arguments={**self.network},
            metrics=self.evaluation.to_dict(),
            extras={
                KEY: self.schema.to_dict(),
                "training": {
                    "method": self.settings.method,
                    "split": self.split,
                    "time": self.time,
                    "rows": {name: len(r) for name, r in self.rows.items()},
                    "base": self.base,
                    "left_out": self.left_out,
                    "notes": self.notes,
                    "epochs": self.history.epochs,
                },
            },
            overwrite=overwrite,
        )


def fit_table(
    data: object,
    target: str,
    settings: TableOptions | None = None,
    *,
    kinds: dict[str, str] | None = None,
    ignore: tuple[str, ...] = (),
    group: str | None = None,
    time: str | None = None,
    task: str | None = None,
    reading: Reading | None = None,
    progress: bool | None = None,
    compile: bool = False,
) -> Fitted:
    """Train, calibrate and evaluate a predictor of one column of a table from the others.

    data: a path, a pyarrow.Table, a pandas frame or a dict of columns. kinds, ignore, task: see `infer`.
    group, time: the column of groups that stay in one part, or of times by which the table is split; no inputs.
    reading: how files are read and how text writes missing cells, numbers and dates; the artifact keeps it.
    compile: whether the returned predictor compiles; predictions are then faster, but the first takes seconds.

    Rows without a target are left out. Raises ValueError with the reason if the table cannot be used.
    """
    settings = settings or TableOptions()
    notes: list[str] = []
    table, reading = training_table(data, reading, kinds, notes)
    if target not in table.column_names:
        raise ValueError(f"there is no column {target!r} to predict; there are {table.column_names}")
    known = has_target(table.column(target), reading.missing)
    if table.num_rows and not known.all():
        notes.append(
            f"{int((~known).sum())} of {len(known)} rows have no {target} and were left out"
            f"{_words(table.column(target), known)}"
        )
    keep = torch.from_numpy(known).nonzero().flatten()
    table = table.take(keep.numpy())
    if table.num_rows < _MIN_ROWS:
        raise ValueError(
            f"{table.num_rows} rows with a target are too few to train, calibrate and test on: {_MIN_ROWS}"
        )
    apart = [name for name in (group, time) if name is not None]
    for name in apart:
        if name == target:
            raise ValueError(f"{name!r} is the target, by which rows cannot be split: give another column")
    ignore = (*ignore, *(name for name in apart if name not in (kinds or {})))
    parts = divide_table(table, target, task, ignore, settings.shares, group, time, settings.seed, reading)
    train = parts.rows["train"]
    schema, left_out = infer(table, target, train.numpy(), kinds, ignore, task, reading, notes)
    encoded = schema.encode(table)
    parts = parts.of_encoded(encoded.x)
    notes += parts.notes
    if encoded.rejected:
        row, reason = min(encoded.rejected.items())
        notes.append(
            f"{len(encoded.rejected)} rows could not be read and were left out, row {int(keep[row])}: {reason}"
        )
    y, labeled = schema.target.encode(table.column(target))
    usable = encoded.kept & labeled
    rows = {name: r[usable[r]] for name, r in parts.rows.items()}
    x = {name: encoded.x[r] for name, r in rows.items()}
    targets = {name: y[r] for name, r in rows.items()}
    if empty := [name for name, r in rows.items() if len(r) == 0]:
        raise ValueError(f"no row of part {empty[0]!r} can be read")

    for name, share in giveaways(schema.columns, x["train"], targets["train"], settings.seed).items():
        notes.append(
            f"column {name!r} alone says {target} almost perfectly ({share:.1%} of it, in held-out training rows): "
            f"is it known when predictions are made? (--ignore {name} leaves it out)"
        )

    n_train = len(targets["train"])
    arguments = settings.network_arguments(schema, n_train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = TabularNetwork(**arguments)
    posterior, likelihood = settings.posterior(network, n_train), settings.likelihood(schema, n_train)
    validation = (x["validation"], targets["validation"])
    history = fit(
        posterior,
        (x["train"], targets["train"]),
        likelihood,
        validation=validation,
        progress=progress,
        **settings.training(n_train),
    )
    predictor = Predictor(
        posterior, likelihood, settings.predictor_samples, settings.seed, batch_invariant=True, compile=False
    )
    for_calibration = _calibration_rows(parts, rows["calibration"], x["calibration"], targets["calibration"])
    for_calibration = unseen_rows(for_calibration, x["train"])
    calibrated = calibrate_by_default(predictor, for_calibration, settings.coverage, settings.seed)
    predictor, notes = calibrated.predictor, [*notes, *calibrated.notes]
    base = _base(targets["train"], schema)
    when = None if parts.when is None else parts.when[rows["test"]]
    evaluation = evaluate(predictor, x["test"], targets["test"], schema.target, base, when)
    if compile:
        predictor = predictor.replace(compile=True)
    rows = {name: keep[r] for name, r in rows.items()}
    test = (x["test"], targets["test"])
    return Fitted(
        predictor, schema, settings, evaluation, history, rows, parts.how, left_out, base, arguments, test, notes, time
    )


def _words(column: ArrowColumn, known: np.ndarray) -> str:
    """The words for missing cells in a text column, as the end of a note; "" if all its missing cells are empty."""
    column = decoded(column)
    if not is_text(column.type):
        return ""
    words = {w for w in column.filter(arrow().array(~known)).unique().to_pylist() if w and w.strip()}
    return (
        f": {', '.join(map(repr, sorted(words)))} is read as missing (--missing says which words are)" if words else ""
    )


def _calibration_rows(parts: Parts, rows: Tensor, x: Tensor, y: Tensor) -> CalibrationRows:
    """The calibration rows, with the groups of rows that must not be divided."""
    together = torch.arange(len(y)) if parts.overlap_is_meant else fingerprints(x).unique(return_inverse=True)[1]
    if parts.groups is not None:
        together = joined(parts.groups[rows], together)
    when = None if parts.when is None else parts.when[rows]
    return CalibrationRows(x, y, together, when, parts.overlap_is_meant)


def _base(y: Tensor, schema: Schema) -> Baseline:
    """The simplest predictor: the training rows' mean and std, or class shares smoothed by one row for each class."""
    if schema.target.classes is None:
        return {"mean": float(y.double().mean()), "std": float(y.double().std())}
    counts = torch.bincount(y, minlength=len(schema.target.classes)).double() + 1
    return {"shares": (counts / counts.sum()).tolist()}
