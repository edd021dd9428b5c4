"""An artefact as a folder: which files it may hold, how they are read and how a folder appears whole or not at all."""

import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from vbdl.artefact.manifest import CARD, MANIFEST, TENSORS, ArtefactError

_HIDDEN = {".gitattributes", ".gitignore", ".DS_Store", ".cache"}  # what git, the Hub and desktops leave; never opened


def locate(folder: Path) -> dict[str, Path]:
    """The files of an artefact by name, or ArtefactError; nothing is opened."""
    if not folder.is_dir():
        reason = "a file" if folder.exists() else "not there"
        raise ArtefactError(f"{folder} is {reason}: an artefact is a folder with {MANIFEST} and {TENSORS}")
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in _HIDDEN:
                continue
            if entry.name not in (MANIFEST, TENSORS, CARD):
                raise ArtefactError(
                    f"{folder} holds {ascii(entry.name[:80])}, which no artefact does: nothing was read. An artefact "
                    f"holds {MANIFEST}, {TENSORS} and {CARD}; keep other files in a folder of their own"
                )
            if entry.is_symlink():
                raise ArtefactError(f"{entry.name} is a symbolic link: an artefact holds its files itself")
            found[entry.name] = Path(entry.path)
    for name in (MANIFEST, TENSORS):
        if name not in found:
            raise ArtefactError(f"{folder} has no {name}: it is not an artefact of vbdl, or not a whole one")
    return found


def open_regular(path: Path) -> tuple[int, int]:
    """A file descriptor of a regular file and its size; links and devices are refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ArtefactError(f"{path.name} cannot be opened: {error.strerror}") from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise ArtefactError(f"{path.name} is not a regular file")
    return descriptor, about.st_size


def read_whole(path: Path, limit: int) -> bytes:
    """The bytes of a file that is no larger than `limit`."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size > limit:
            raise ArtefactError(f"{path.name} has {size} bytes, more than {limit}")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ArtefactError(f"{path.name} grew past {limit} bytes while it was read")
    return data


def write_folder(folder: Path, files: Mapping[str, bytes], replace: Callable[[Path], object] | None) -> None:
    """The folder with these files, written beside it, on the disk, then renamed into place.

    Raises FileExistsError where something is there already, unless `replace` is given: it raises where what is there
    must not be deleted. Then it is replaced by two renames, and whoever reads at that moment finds the old one, the
    new one or none, never a mixture.
    """
    folder = Path(os.path.abspath(folder))  # a name to rename to, not what a link at its end points to
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} is there and is not a folder")
    if folder.exists() and any(folder.iterdir()):
        if replace is None:
            raise FileExistsError(f"{folder} is there already: choose another folder, or overwrite=True")
        replace(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    before = folder.with_name(f".{folder.name}.{os.getpid()}.before")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write_files(partial, files)
        if folder.exists() and any(folder.iterdir()):
            os.rename(folder, before)
        try:
            os.rename(partial, folder)
        except OSError:
            if before.exists():
                os.rename(before, folder)
            raise
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """The files in a folder that is there, on the disk when this returns."""
    for name, data in files.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
