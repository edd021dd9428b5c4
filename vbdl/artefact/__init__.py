"""A predictor as a folder: safetensors, a manifest in JSON, a model card. `Predictor.save` and `vbdl.load`."""

from vbdl.artefact.manifest import ArtefactError as ArtefactError
from vbdl.artefact.manifest import Manifest as Manifest
from vbdl.artefact.manifest import read as read
