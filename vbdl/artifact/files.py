"""An artifact as a folder: which files it may hold, how they are read and how a folder appears whole or not at all."""

import ctypes
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from vbdl.artifact.manifest import CARD, MANIFEST, TENSORS, ArtifactError

_HIDDEN = {".gitattributes", ".gitignore", ".DS_Store", ".cache"}  # what git, the Hub and desktops leave; never opened


def locate(folder: Path) -> dict[str, Path]:
    """The files of an artifact by name, or ArtifactError; nothing is opened.

    Where a process was killed while it replaced the artifact by two renames, they are those of the old one.
    """
    folder = next((f for f in (folder, _before(folder), folder) if f.is_dir()), folder)
    if not folder.is_dir():
        reason = "a file" if folder.exists() else "not there"
        raise ArtifactError(f"{folder} is {reason}: an artifact is a folder with {MANIFEST} and {TENSORS}")
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in _HIDDEN:
                continue
            if entry.name not in (MANIFEST, TENSORS, CARD):
                raise ArtifactError(
                    f"{folder} holds {ascii(entry.name[:80])}, which no artifact does: nothing was read. An artifact "
                    f"holds {MANIFEST}, {TENSORS} and {CARD}; keep other files in a folder of their own"
                )
            if entry.is_symlink():
                raise ArtifactError(f"{entry.name} is a symbolic link: an artifact holds its files itself")
            found[entry.name] = Path(entry.path)
    for name in (MANIFEST, TENSORS):
        if name not in found:
            raise ArtifactError(f"{folder} has no {name}: it is not an artifact of vbdl, or not a whole one")
    return found


def open_regular(path: Path) -> tuple[int, int]:
    """A file descriptor of a regular file and its size; links and devices are refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ArtifactError(f"{path.name} cannot be opened: {error.strerror}") from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise ArtifactError(f"{path.name} is not a regular file")
    return descriptor, about.st_size


def read_whole(path: Path, limit: int) -> bytes:
    """The bytes of a file that is no larger than `limit`."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size > limit:
            raise ArtifactError(f"{path.name} has {size} bytes, more than {limit}")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ArtifactError(f"{path.name} grew past {limit} bytes while it was read")
    return data


def check_place(folder: Path, replace: Callable[[Path], object] | None) -> bool:
    """Whether a folder is there already that may be replaced. Raises OSError where it may not, as for `write_folder`,
    or where nothing can be written beside it: before hours of work, rather than after."""
    folder = Path(os.path.abspath(folder))
    taken = _is_taken(folder, replace)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        partial.rmdir()
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}") from error
    return taken


def _is_taken(folder: Path, replace: Callable[[Path], object] | None) -> bool:
    """Whether something is at the name. FileExistsError where it may not be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} is there and is not a folder")
    taken = folder.exists() and any(folder.iterdir())
    if taken:
        if replace is None:
            raise FileExistsError(f"{folder} is there already: choose another folder, or overwrite=True (--overwrite)")
        replace(folder)
    return taken


def write_folder(folder: Path, files: Mapping[str, bytes], replace: Callable[[Path], object] | None) -> None:
    """The folder with these files, written beside it, on the disk, then renamed into place.

    Raises FileExistsError where something is there already, unless `replace` is given: it raises where what is there
    must not be deleted. Then the two change places in one step, so that a whole artifact is there at any time, also
    where the process is killed. A file system that cannot do that gets two renames; whoever reads between them, or
    after a kill between them, is given the old one (`locate`).
    """
    check_place(folder, replace)
    folder = Path(os.path.abspath(folder))  # a name to rename to, not what a link at its end points to
    partial, before = _partial(folder), _before(folder)
    try:
        partial.mkdir()
        write_files(partial, files)
        for attempt in range(_ATTEMPTS):
            try:
                _put(partial, folder, before)
                break
            except OSError as error:  # another one has been saved to this name, or taken away, in this moment
                if error.errno not in _OVERTAKEN or attempt == _ATTEMPTS - 1:
                    raise
                _is_taken(folder, replace)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what is not finished, or what was replaced
    shutil.rmtree(before, ignore_errors=True)


_ATTEMPTS = 100
_OVERTAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT)


def _put(partial: Path, folder: Path, before: Path) -> None:
    """The new folder at the name; where there was one, it is at the other name or gone."""
    if not folder.exists():
        os.rename(partial, folder)
    elif not _exchanged(partial, folder):
        shutil.rmtree(before, ignore_errors=True)  # of a kill after both renames: the newer one is at the name
        os.rename(folder, before)
        try:
            os.rename(partial, folder)
        except OSError:
            os.rename(before, folder)
            raise


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_ident()}.partial")


def _before(folder: Path) -> Path:
    """Where the old artifact is between two renames."""
    return folder.with_name(f".{folder.name}.before") if folder.name else folder


def _exchanged(a: Path, b: Path) -> bool:
    """Two folders have changed places, in one step; False where this system or file system cannot do that."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None:
        return False
    here, exchange = -100, ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))


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
