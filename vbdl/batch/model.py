"""Facts about a model that are read without loading it: its digest, its table's schema, the shape of an image."""

import hashlib
from pathlib import Path

import torch

from vbdl.artifact.manifest import Inputs, read
from vbdl.artifact.tensors import DTYPES
from vbdl.batch.sources.image_folder import ImageRow
from vbdl.engine.predictor import Predictor
from vbdl.tabular import Schema, schema_of

Model = Predictor | str | Path
"""A predictor, or the folder of a saved one."""


def digest(model: Model) -> str:
    """Return the SHA-256 of the model, by which a job that was started with another model is not resumed."""
    if isinstance(model, Predictor):
        sha = hashlib.sha256(f"{model.seed} {model.n_samples} {model.likelihood!r}".encode())
        for module in (model.posterior, model.likelihood):
            for name, t in module.state_dict().items():
                sha.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
                sha.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()
    manifest = Path(model) / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"{model} is not a saved model: there is no {manifest}")
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def schema_at(model: Model) -> Schema | None:
    """Return the schema of the table that a model was trained on, or None if it was not trained on a table."""
    if isinstance(model, Predictor):
        return None if model.manifest is None else schema_of(model.manifest.extras)
    return schema_of(read(model).extras)


def row_shape(model: Predictor) -> tuple[int, ...] | None:
    """Return the shape of a row of the network's one input, or None if it has several or does not record it."""
    inputs = _inputs(model)
    return None if inputs is None or len(inputs.tensors) != 1 else tuple(inputs.tensors[0].shape)


def image_row(model: Model) -> ImageRow | None:
    """Return the shape and dtype of one image as the network takes it, or None if the model does not record it."""
    inputs = _inputs(model)
    if inputs is None or len(inputs.tensors) != 1 or len(inputs.tensors[0].shape) not in (2, 3):
        return None
    return ImageRow(tuple(inputs.tensors[0].shape), DTYPES[inputs.tensors[0].dtype])


def _inputs(model: Model) -> Inputs | None:
    if isinstance(model, Predictor):
        return None if model.manifest is None else model.manifest.inputs
    return read(model).inputs
