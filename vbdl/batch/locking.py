"""A file lock, so that only one process at a time writes to a folder."""

import errno
import fcntl
import os
from pathlib import Path

from vbdl.batch.naming import LOCK, check_place


def lock(path: Path) -> int:
    """Lock the folder and return the open lock file. Raises ValueError if another process holds the lock."""
    for _ in range(100):
        try:
            handle = _open_lock(path / LOCK)
        except FileNotFoundError:  # the process that held the lock has removed it with its folder
            path.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.lstat(path / LOCK)):
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(handle)
            break
        os.close(handle)
    raise ValueError(f"another job is writing to {path}")


def _open_lock(path: Path) -> int:
    check_place(path.parent, path.name)
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except OSError as error:  # reading is enough for a finished job
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | flags)
