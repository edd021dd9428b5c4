"""Conversion of a prediction to named, typed columns.

| column | type | content |
| --- | --- | --- |
| `prediction` | the label's own type, int64 if classes have no names | the most probable class |
| `probability_<class>` | float32 | the probability of each class; one list column `probabilities` above 20 classes |
| `mean`, `std` | float32 | mean and std of a regression, in target units |
| `total`, `aleatoric`, `epistemic` | float32 | nats, or squared target units |
| `lower`, `upper` | float32 | the calibrated interval, or the central interval that was asked for |
| `set` | list of labels | the classes of a conformal set |
| `action` | int64, float for a position | the decision |
| `reason` | int64 | the rule that referred the row, counted from 1; 0: none |
| `distance` | float32 | from the training rows, in the space of features |
| `confidence`, `standard_error_<class>` | float32 | if asked for by name |
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vbdl.tabular.reading import arrow
from vbdl.types import Prediction

if TYPE_CHECKING:
    import pyarrow

Columns = dict[str, "pyarrow.Array"]
Labels = Sequence[str | int | bool]
"""The classes in the order of the network's outputs, with the type that they have in files."""

EXTRA = ("confidence", "standard_error")
COLUMNS = (
    "prediction", "probabilities", "mean", "std", "total", "aleatoric", "epistemic", "lower", "upper", "set", "action",
    "reason", "distance", *EXTRA,
)  # fmt: skip
_WIDE = 20  # largest number of columns of one field; wider fields become list columns


def fields(prediction: Prediction, labels: Labels | None, wanted: Sequence[str] | None, interval: float) -> Columns:
    """Return {name: Arrow array} of a prediction.

    labels: values of the classes in files. wanted: names in COLUMNS; all that exist except EXTRA unless given.
    interval: level of the central interval in `lower` and `upper`, from a prediction with samples; 0 for those of the
    calibration. Raises ValueError for a wanted column that this prediction lacks.
    """
    probs = prediction.probs
    count = None if probs is None or probs.ndim == prediction.total.ndim else probs.shape[-1]
    if labels is not None and count is not None and len(labels) != count:
        raise ValueError(f"the model names {len(labels)} classes, but predicts {count}: save it with classes=[...]")
    columns: Columns = {}
    for name in wanted if wanted is not None else [n for n in COLUMNS if n not in EXTRA]:
        column = _column(name, prediction, labels, interval)
        if not column and wanted is not None:
            raise ValueError(f"this model's predictions have no {name!r}")
        columns |= column
    return columns


def _column(name: str, p: Prediction, labels: Labels | None, interval: float) -> Columns:
    probs = p.probs
    if name == "prediction":
        return {} if p.label is None else _labels(p.label, labels)
    if name == "probabilities":
        if probs is None:
            return {}
        return _spread("probability", probs, labels if probs.ndim == p.total.ndim + 1 else None)
    if name in ("lower", "upper") and interval > 0:
        if probs is not None:
            raise ValueError("an interval is of a regression; for classes calibrate with ConformalSets")
        return _spread(name, p.interval(interval)[0 if name == "lower" else 1])
    if name == "set":
        return {} if p.sets is None else {"set": _sets(p.sets, labels)}
    value = p.values().get(name)
    if value is None:
        return {}
    if name == "standard_error" and probs is not None:  # one per class, like the probabilities
        return _spread(name, value, labels if value.ndim == p.total.ndim + 1 else None)
    return _spread(name, value.to(torch.int64) if name == "action" and not value.is_floating_point() else value)


def _spread(name: str, t: Tensor, labels: Labels | None = None) -> Columns:
    """Return a field (batch, ...) as one column, one column per entry, or a list column."""
    pa = arrow()
    t = t.detach().cpu()
    if t.ndim > 1 and t.shape[1:].numel() == 1 and labels is None:
        t = t.reshape(len(t))
    if t.ndim == 1:
        return {name: pa.array(t.numpy())}
    if t.ndim == 2 and t.shape[1] <= _WIDE:
        names = labels if labels is not None else range(t.shape[1])
        flat = t.t().contiguous().numpy()
        return {f"{name}_{_word(label)}": pa.array(column) for label, column in zip(names, flat, strict=True)}
    plural = "probabilities" if name == "probability" else name
    flat = pa.array(t.contiguous().reshape(-1).numpy())
    return {plural: pa.FixedSizeListArray.from_arrays(flat, t.shape[1:].numel())}


def _word(label: object) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)


def _labels(numbers: Tensor, labels: Labels | None) -> Columns:
    pa = arrow()
    if numbers.dtype == torch.bool or labels is None:
        return _spread("prediction", numbers if numbers.dtype == torch.bool else numbers.to(torch.int64))
    return {"prediction": pa.array(list(labels)).take(pa.array(numbers.cpu().numpy()))}


def _sets(sets: Tensor, labels: Labels | None) -> "pyarrow.Array":
    pa = arrow()
    is_member = sets.cpu().numpy()
    offsets = np.concatenate([[0], is_member.sum(1).cumsum()]).astype(np.int32)
    members = pa.array(np.nonzero(is_member)[1].astype(np.int64))
    values = members if labels is None else pa.array(list(labels)).take(members)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
