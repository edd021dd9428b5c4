"""The folder of an artifact: the files it may hold, safe reading, and atomic writing."""

import ctypes
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from vbdl.artifact.manifest import CARD, MANIFEST, TENSORS, ArtifactError

_HIDDEN = {".gitattributes", ".gitignore", ".DS_Store", ".cache"}  # written by git, the Hub and desktops; never opened


_READINGS = 50  # attempts: another process may replace the artifact faster than a busy machine reads it
_LOOKS = 5
Read = TypeVar("Read")


def read_again(folder: Path, read: Callable[[], Read]) -> Read:
    """Call a function that reads an artifact's folder, again if the folder was replaced while it read.

    Raises the ArtifactError of a reading during which the folder stayed.
    """
    for attempt in range(_READINGS):
        identity = _identity(folder)
        try:
            return read()
        except ArtifactError:
            # between the two renames of a replacement there is no folder: what is missing is looked for a few times
            if _identity(folder) == identity and (identity is not None or attempt == _LOOKS):
                raise
    raise ArtifactError(f"{folder} was replaced {_READINGS} times while it was read")


def _identity(folder: Path) -> tuple[int, int] | None:
    """(inode, change time in ns) of the folder; changes when the artifact is replaced, an inode alone may be reused."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def locate(folder: Path) -> dict[str, Path]:
    """The paths of an artifact's files by file name; no file is opened.

    If a process was killed between the two renames of a replacement, these are the files of the previous artifact.
    Raises ArtifactError if the folder is missing, incomplete, or holds a symbolic link or any other file.
    """
    folder = next((f for f in (folder, _before(folder), folder) if f.is_dir()), folder)
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {reason}; an artifact is a folder with {MANIFEST} and {TENSORS}")
    paths = {}
    try:
        with os.scandir(folder) as entries:  # one by one: nothing after the first wrong one is read
            for entry in entries:
                if entry.name in _HIDDEN:
                    continue
                _check_entry(folder, entry)
                paths[entry.name] = Path(entry.path)
    except FileNotFoundError as error:  # it was there a moment ago
        raise ArtifactError(f"{folder} was removed or replaced while it was read") from error
    for name in (MANIFEST, TENSORS):
        if name not in paths:
            raise ArtifactError(f"{folder} has no {name}: it is no vbdl artifact, or an incomplete one")
    return paths


def _check_entry(folder: Path, entry: os.DirEntry[str]) -> None:
    """Raise ArtifactError for anything that an artifact's folder does not hold."""
    if entry.name not in (MANIFEST, TENSORS, CARD):
        raise ArtifactError(
            f"{folder} holds {ascii(entry.name[:80])}, so nothing was read: an artifact holds only "
            f"{MANIFEST}, {TENSORS} and {CARD}; keep other files in another folder"
        )
    if entry.is_symlink():
        raise ArtifactError(f"{entry.name} is a symbolic link; put the file itself into the artifact's folder")


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading: (file descriptor, size in bytes).

    Raises ArtifactError for a link, a device or a file that cannot be opened.
    """
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
    """The bytes of a regular file; ArtifactError if it has more than `limit` bytes."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size > limit:
            raise ArtifactError(f"{path.name} has {size} bytes, more than the {limit} allowed")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ArtifactError(f"{path.name} grew past {limit} bytes while it was read")
    return data


def check_place(folder: Path, replace: Callable[[Path], object] | None) -> bool:
    """Whether the folder exists and is not empty, so that `write_folder` would replace it.

    Call it before hours of work: it raises the OSError that `write_folder` would raise afterwards, if the folder must
    not be replaced or its parent cannot be written.
    """
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
    """Whether the folder exists and is not empty; FileExistsError if it must not be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} exists and is not a folder; choose another path")
    taken = folder.exists() and any(folder.iterdir())
    if taken:
        if replace is None:
            raise FileExistsError(f"{folder} exists already; choose another folder, or overwrite=True (--overwrite)")
        read_again(folder, lambda: replace(folder))
    return taken


def write_folder(folder: Path, files: Mapping[str, bytes], replace: Callable[[Path], object] | None) -> None:
    """Write a folder of these files (name -> bytes) atomically: to a temporary folder beside it, synced, then renamed.

    replace: called with an existing folder, it raises if that folder must not be deleted; without it an existing
        folder raises FileExistsError.

    An existing folder is exchanged with the new one in one step (renameat2), so that a complete artifact exists at any
    time, even if the process is killed. File systems without that call get two renames; `locate` returns the old
    artifact to whoever reads between the two, or after the process was killed there.
    """
    check_place(folder, replace)
    folder = Path(os.path.abspath(folder))  # not resolve(): a final symbolic link must stay the name that is renamed to
    partial, before = _partial(folder), _before(folder)
    try:
        partial.mkdir()
        write_files(partial, files)
        for attempt in range(_ATTEMPTS):
            try:
                _put(partial, folder, before)
                break
            except OSError as error:  # another process saved or deleted this folder at the same moment
                if error.errno not in _OVERTAKEN or attempt == _ATTEMPTS - 1:
                    raise
                _is_taken(folder, replace)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # the unfinished new folder, or the replaced old one
    shutil.rmtree(before, ignore_errors=True)


_ATTEMPTS = 100
_OVERTAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT)


def _put(partial: Path, folder: Path, before: Path) -> None:
    """Rename the new folder into place; an old one then lies under the name `partial` or `before`."""
    if not folder.exists():
        os.rename(partial, folder)
    elif not _exchanged(partial, folder):
        shutil.rmtree(before, ignore_errors=True)  # left by a process killed after both renames; folder is newer
        os.rename(folder, before)
        try:
            os.rename(partial, folder)
        except OSError:
            os.rename(before, folder)
            raise


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_ident()}.partial")


def _before(folder: Path) -> Path:
    """The path of the old artifact between the two renames of a replacement."""
    return folder.with_name(f".{folder.name}.before") if folder.name else folder


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False if the operating system or the file system cannot."""
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
    """Write the files (name -> bytes) into an existing folder and sync them to disk."""
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
