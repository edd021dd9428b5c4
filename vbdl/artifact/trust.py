"""Imports of names that an artifact stores. Importing runs code, so only the caller of `vbdl.load` can allow it."""

import importlib
from collections.abc import Sequence

from vbdl.artifact.manifest import ArtifactError


def is_trusted(path: str, trust: Sequence[str]) -> bool:
    """Whether the module `path` is a package in `trust` or lies inside one."""
    return any(path == package or path.startswith(f"{package}.") for package in trust)


def untrusted(target: str, otherwise: str = "") -> ArtifactError:
    """The ArtifactError for a "module:name" outside the trusted packages; otherwise: text of another remedy."""
    package = target.partition(":")[0].partition(".")[0]
    return ArtifactError(
        f"the artifact asks to import {target[:120]!r}, which runs code: if you trust it, use "
        f"load(folder, trust=({package[:60]!r},)){otherwise}"
    )


def import_named(target: str) -> object:
    """Import the object that "module:name" names; ArtifactError if that fails."""
    path, _, name = target.partition(":")
    try:
        value: object = importlib.import_module(path)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{target[:120]!r} cannot be imported: {error}") from None
    return value
