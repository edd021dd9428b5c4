"""`fit_table` trains, calibrates and evaluates a predictor of one column of a table."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vbdl.data.fingerprint import fingerprints
from vbdl.engine.predictor import Predictor
from vbdl.tabular.calibrating import CalibrationRows, calibrate_by_default, unseen_rows
from vbdl.tabular.divided import divided_table
from vbdl.tabular.evaluation import Baseline, Evaluation, evaluate
from vbdl.tabular.giveaways import giveaways
from vbdl.tabular.network import NetworkArguments, TabularNetwork
from vbdl.tabular.options import TableOptions
from vbdl.tabular.parts import Parts, joined
from vbdl.tabular.reading import Reading
from vbdl.tabular.schema import KEY, Schema
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
    table = divided_table(
        data, target, settings.shares, settings.seed, kinds=kinds, ignore=ignore, group=group, time=time, task=task,
        reading=reading, least=_MIN_ROWS,
    )  # fmt: skip
    schema, parts, notes = table.schema, table.parts, table.notes
    train, validation, test = table.of("train"), table.of("validation"), table.of("test")
    for name, share in giveaways(schema.columns, *train, settings.seed).items():
        notes.append(
            f"column {name!r} alone says {target} almost perfectly ({share:.1%} of it, in held-out training rows): "
            f"is it known when predictions are made? (--ignore {shlex.quote(name)} leaves it out)"
        )

    n_train = len(train[1])
    arguments = settings.network_arguments(schema, n_train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = TabularNetwork(**arguments)
    posterior, likelihood = settings.posterior(network, n_train), settings.likelihood(schema, n_train)
    history = fit(
        posterior,
        train,
        likelihood,
        validation=validation,
        progress=progress,
        **settings.training(n_train),
    )
    predictor = Predictor(
        posterior, likelihood, settings.predictor_samples, settings.seed, batch_invariant=True, compile=False
    )
    for_calibration = _calibration_rows(parts, table.rows["calibration"], *table.of("calibration"))
    for_calibration = unseen_rows(for_calibration, train[0])
    calibrated = calibrate_by_default(predictor, for_calibration, settings.coverage, settings.seed)
    predictor, notes = calibrated.predictor, [*notes, *calibrated.notes]
    base = _base(train[1], schema)
    when = None if parts.when is None else parts.when[table.rows["test"]]
    evaluation = evaluate(predictor, *test, schema.target, base, when)
    if compile:
        predictor = predictor.replace(compile=True)
    rows = {name: table.keep[r] for name, r in table.rows.items()}
    return Fitted(
        predictor, schema, settings, evaluation, history, rows, parts.how, table.left_out, base, arguments, test, notes,
        time,
    )  # fmt: skip


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
