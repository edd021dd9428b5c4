"""Saving and loading a predictor as a folder of safetensors, a JSON manifest and a model card."""

from vbdl import former
from vbdl.artifact.manifest import ArtifactError as ArtifactError
from vbdl.artifact.manifest import Manifest as Manifest
from vbdl.artifact.manifest import read as read

__getattr__ = former.names(__name__, {"ArtefactError": "ArtifactError"})
