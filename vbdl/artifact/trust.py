"""Imports of names that an artifact stores. Importing runs code, so only the caller of `vbdl.load` can allow it."""

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

from vbdl.artifact.manifest import ArtifactError


def is_trusted(path: str, trust: Sequence[str]) -> bool:
    """Whether the module `path` is a package in `trust` or lies inside one."""
    return any(path == package or path.startswith(f"{package}.") for package in trust)


class _Here(MetaPathFinder):
    """Finds trusted packages in the working directory, after every other place; nothing else is imported from there."""

    def __init__(self, packages: Sequence[str]):
        self.packages = {package.partition(".")[0] for package in packages}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.packages:  # what is inside a package is found by its path
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, [os.getcwd()], target)


def look_here(packages: Sequence[str]) -> None:
    """Let these packages be imported from the working directory, where an installed command does not look."""
    if packages:
        sys.meta_path.append(_Here(packages))


def untrusted(target: str, otherwise: str = "", packages: Sequence[str] = ()) -> ArtifactError:
    """The ArtifactError for a "module:name" outside the trusted packages.

    otherwise: text of another remedy. packages: those to trust, default: the one that the target is in.
    """
    each = [p[:60] for p in packages or [target.partition(":")[0].partition(".")[0]]]
    return ArtifactError(
        f"the artifact asks to import {target[:120]!r}, which runs code: if you trust it, use "
        f"load(folder, trust={tuple(each)!r}), on the command line --trust {' '.join(each)}{otherwise}"
    )


def import_named(target: str) -> object:
    """Import the object that "module:name" names; ArtifactError if that fails."""
    path, _, name = target.partition(":")
    try:
        value: object = importlib.import_module(path)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        how = ""
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            package, missing = path.partition(".")[0][:60], error.name[:60]
            how = ". Name its folder in the variable PYTHONPATH (PYTHONPATH=. for this one), or install it"
            if missing != package:
                how += (
                    f"; the command line also looks in this folder for it if it is trusted: --trust {package} {missing}"
                )
        raise ArtifactError(f"{target[:120]!r} cannot be imported: {error}{how}") from None
    return value
