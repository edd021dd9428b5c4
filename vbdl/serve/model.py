"""The model of a service: loads and warms up an artifact, turns predictions into answers, describes the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import msgspec
import numpy as np
import torch
from torch import Tensor

from vbdl import tabular
from vbdl.artifact import card
from vbdl.artifact.files import locate, read_whole
from vbdl.artifact.loading import LoadOptions, load
from vbdl.artifact.manifest import CARD, class_names
from vbdl.artifact.tensors import DTYPES
from vbdl.calibration.calibrated import calibrations
from vbdl.decision.cost import REFER
from vbdl.engine.adaptive import step_size
from vbdl.serve import json_schema
from vbdl.serve.bodies import Bodies, Notes
from vbdl.types import Decision, Inputs, Json, Prediction

if TYPE_CHECKING:
    from vbdl.batch.output import Columns


class Model:
    """A loaded predictor with the names of its inputs and the classes of its outputs.

    settings: arguments of vbdl.load (trust, tiles, device, compile, ...). Raises ValueError if the artifact does not
    describe its inputs.
    """

    def __init__(self, folder: str | Path, **settings: Unpack[LoadOptions]):
        self.name = Path(folder).resolve().name
        # requests share batches, and an answer must not depend on the other rows of its batch
        self.predictor = load(folder, **{"batch_invariant": True, **settings})
        assert self.predictor.manifest is not None  # load sets it
        self.manifest = self.predictor.manifest
        self.schema = tabular.schema_of(self.manifest.extras)
        if self.schema is None and self.manifest.inputs is None:
            raise ValueError(f"{folder} does not say what a row looks like: save it with save(folder, example=x)")
        text = locate(Path(folder)).get(CARD)
        self.card = "" if text is None else read_whole(text, 2**20).decode("utf-8", "replace")
        self.classes = self._classes()
        self.bodies = Bodies(self.schema, self.manifest.inputs)

    def _classes(self) -> list[str | int | bool] | None:
        target = self.schema.target if self.schema else None
        if target is None:
            return class_names(self.manifest.extras)
        if target.classes is None:
            return None
        return [target.label(k) for k in range(len(target.classes))]

    # -- what a row looks like

    def example(self) -> Inputs:
        """A row with arbitrary values that can be predicted."""
        if self.schema is not None:
            return self.schema.example()
        zeros = [torch.zeros(1, *entry.shape, dtype=DTYPES[entry.dtype]) for entry in self.bodies.entries]
        return self.bodies.together(zeros)

    @property
    def anytime(self) -> bool:
        """Whether there are enough draws for several steps, so that a deadline can be met with fewer of them."""
        return step_size(self.predictor.n_samples) < self.predictor.n_samples

    @property
    def preparing(self) -> str:
        """A sentence about what the model does before it can answer."""
        return f"the model is being {'compiled' if self.predictor.settings.compile else 'made ready'}"

    def warm_up(self) -> None:
        """Compile everything that batches and deadlines need; nothing is compiled afterwards."""
        example = self.example()
        self.predictor.warm_up(self.predictor.tiles, example=example, adaptive=self.anytime)
        if self.schema is not None or self.classes is None:
            return
        probs = self.predictor(example).probs
        count = None if probs is None else 2 if probs.ndim == 1 else probs.shape[-1]
        if len(self.classes) != count:
            raise ValueError(
                f"the artifact names {len(self.classes)} classes, but the model predicts {count or 'none'}: save it "
                f"with classes=[...], one name for each"
            )

    # -- predictions to answers

    def answer(self, prediction: Prediction, notes: Notes) -> Json:
        """Return the JSON answer: one object per row; infinite and unknown numbers become null."""
        classes = self.classes
        columns: dict[str, list] = {name: _single(value).tolist() for name, value in prediction.values().items()}
        label = prediction.label
        if label is not None:
            numbers = label.tolist()
            columns["label"] = [classes[int(k)] for k in numbers] if classes and label.ndim == 1 else numbers
        if "sets" in columns:
            columns["sets"] = [
                [classes[k] if classes else k for k, inside in enumerate(row) if inside] for row in columns["sets"]
            ]
        if self.decision is not None and prediction.action is not None:
            columns |= self._in_words(self.decision, prediction.action, prediction.reason)
        if any(layer.method.acts_on == "probs" for layer in calibrations(self.predictor.likelihood)):
            columns.pop("standard_error", None)  # it is of the mean before that calibration
        names = list(columns)
        predictions = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        answer: Json = {"predictions": predictions, "n_samples": _counts(prediction)}
        if self.classes is not None:
            answer["classes"] = self.classes
        return answer | ({"notes": notes} if notes else {})

    @property
    def decision(self) -> Decision | None:
        """The decision inside the predictor, if it has one that says its actions in words."""
        found = getattr(self.predictor.likelihood, "decision", None)
        return found if isinstance(found, Decision) else None

    @staticmethod
    def _in_words(decision: Decision, action: Tensor, reason: Tensor | None) -> dict[str, list[str | None]]:
        """The action of each row in words, and why it was referred."""
        words = decision.words(action)
        if words is None:
            return {}
        if reason is None:
            reason = (action == REFER).to(torch.int64)
        because = (None, *decision.reasons) if decision.reasons else None
        named = [] if because is None else [because[min(int(k), len(because) - 1)] for k in reason.tolist()]
        return {"decision": list(words), **({} if because is None else {"reason": named})}

    def columns(self, prediction: Prediction) -> "Columns":
        """Return {name: Arrow array} of the columns that `vbdl predict` writes, and of the number of draws."""
        import pyarrow as pa

        from vbdl.batch.output import fields

        counts = np.broadcast_to(np.asarray(_counts(prediction), np.int64), len(prediction.total))
        return {**fields(prediction, self.classes, None, 0), "n_samples": pa.array(counts)}

    # -- descriptions

    def about(self) -> Json:
        """Return the description of the model that `GET /v1/model` answers with."""
        m = self.manifest
        return {
            "name": self.name,
            "method": card.method(m),
            "likelihood": card.likelihood(m.likelihood),
            "fitted": m.fitted,
            "n_samples": self.predictor.n_samples,
            "tiles": list(self.predictor.tiles),
            "seed": self.predictor.seed,
            "versions": msgspec.to_builtins(m.versions),
            "classes": self.classes,
            "target": None if self.schema is None else self.schema.target.name,
            "row": json_schema.row(self.schema) if self.schema else None,
            "inputs": None
            if self.schema
            else [json_schema.array(e, name=json_schema.key_of(i, e)) for i, e in enumerate(self.bodies.entries)],
            "layout": "rows" if self.schema or m.inputs is None else m.inputs.layout,
            "training_rows": m.training_rows,
            "metrics": m.metrics,
            "card": self.card,
        }


def _counts(prediction: Prediction) -> int | list[int]:
    """The number of draws of each row, or one number if it is the same for all rows."""
    counts = prediction.n_samples
    return counts.tolist() if isinstance(counts, Tensor) else counts


def _single(t: Tensor) -> Tensor:
    """A tensor (batch, 1) as (batch,), so that a regression with one output gives one number; others unchanged."""
    return t.squeeze(1) if t.ndim == 2 and t.shape[1] == 1 else t
