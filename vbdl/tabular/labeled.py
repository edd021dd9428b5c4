"""Rows with known targets for the evaluation or calibration of a saved model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vbdl.artifact.saving import training_rows
from vbdl.calibration.calibrated import calibration_rows
from vbdl.data.fingerprint import fingerprints
from vbdl.engine.predictor import Predictor
from vbdl.tabular.parts import moments
from vbdl.tabular.reading import as_table
from vbdl.tabular.schema import KEY, Schema


@dataclass(frozen=True)
class Labeled:
    """The rows of a table that could be read and have a target."""

    x: Tensor
    y: Tensor
    schema: Schema
    notes: list[str]
    when: Tensor | None = None  # (rows,) the order in time, if the model's table was divided by a column that is here


def labeled(
    predictor: Predictor, data: object, allow_training_rows: bool = False, allow_calibration_rows: bool = False
) -> Labeled:
    """Encode the rows of a table and their targets for a loaded predictor.

    Raises ValueError if the model was not made from a table, the target's column is missing, or rows were used for
    training or calibration.
    """
    described = None if predictor.manifest is None else predictor.manifest.extras.get(KEY)
    if described is None:
        raise ValueError("this model was not made by vbdl fit: it has no columns. Use vbdl.metrics on its predictions")
    schema = Schema.from_dict(described)
    table = as_table(data, schema.files)
    if schema.target.name not in table.column_names:
        raise ValueError(f"there is no column {schema.target.name!r} with the truth; there are {table.column_names}")
    encoded = schema.encode(table)
    y, known = schema.target.encode(table.column(schema.target.name))
    usable = encoded.kept & known
    notes = []
    if encoded.rejected:
        row, reason = min(encoded.rejected.items())
        notes.append(f"{len(encoded.rejected)} rows could not be read and were left out; row {row}: {reason}")
    if not bool(known.all()):
        notes.append(f"{int((~known).sum())} rows have no {schema.target.name} and were left out")
    notes += [f"{n} cells of {name!r} are categories that training did not have" for name, n in encoded.unseen.items()]
    notes += [f"{n} cells of {name!r} were missing and filled: training had none" for name, n in encoded.filled.items()]
    x, y = encoded.x[usable], y[usable]
    assert predictor.manifest is not None  # it has the schema
    time = predictor.manifest.extras.get("training", {}).get("time")
    when = None
    if time is not None and time in table.column_names:
        when = moments(table, time, schema.files)[0][usable]
    if not len(y):
        raise ValueError("there are no rows with a target")
    prints = fingerprints(x)
    seen, (used, complete) = training_rows(predictor.posterior), calibration_rows(predictor.likelihood)
    for rows, done, allowed in (
        (seen, "trained", allow_training_rows),
        (used, "calibrated", allow_calibration_rows),
    ):
        n_seen = 0 if rows is None else int(torch.isin(prints, rows).sum())
        if n_seen and not allowed:
            raise ValueError(f"{n_seen} of {len(y)} rows were {done} on: give rows that the model has not seen")
        if n_seen:
            notes.append(f"{n_seen} of {len(y)} rows were {done} on: the scores are too good")
    if not complete and not allow_calibration_rows:
        notes.append("which rows the model was calibrated on is not recorded: scores on these would be too good")
    return Labeled(x, y, schema, notes, when)
