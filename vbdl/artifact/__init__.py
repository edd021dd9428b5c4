"""A predictor as a folder: safetensors, a manifest in JSON, a model card. `Predictor.save` and `vbdl.load`."""

from vbdl import former
from vbdl.artifact.manifest import ArtifactError as ArtifactError
from vbdl.artifact.manifest import Manifest as Manifest
from vbdl.artifact.manifest import read as read

__getattr__ = former.names(__name__, {"ArtefactError": "ArtifactError"})
