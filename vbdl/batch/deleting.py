"""Deletion of the hidden folder of parts, after the parts have become one file."""

import os
from contextlib import suppress
from pathlib import Path

from vbdl.batch.locking import lock
from vbdl.batch.naming import JOURNAL, LOCK, MANIFEST, QUARANTINE, Names, files_below
from vbdl.batch.records import JobRecord, read_records


def discard(path: Path, settings: JobRecord) -> None:
    """Delete the files of this job from its hidden folder, and the folder if it is empty then. Does nothing if the
    folder holds the records of another job or another process works in it."""
    if path.is_symlink() or not path.is_dir():
        return
    try:
        if read_records(path, settings).settings not in (None, settings):
            return
        held = lock(path)
    except ValueError:
        return
    try:
        delete_all(path, Names(settings))
    finally:
        os.close(held)


def delete_all(path: Path, names: Names) -> None:
    """Delete the files of the job with these names, and the folder if it is empty then. The records go last, because
    until then they say what the other files are."""
    for name in files_below(path):
        if name != JOURNAL and (names.is_part(name) or names.is_in_work(name)):
            (path / name).unlink(missing_ok=True)
    for above, folders, _ in os.walk(path, topdown=False):
        for folder in folders:
            with suppress(OSError):  # the folder is a link or is not empty
                os.rmdir(Path(above, folder))
    for name in (QUARANTINE, JOURNAL, MANIFEST, LOCK):
        with suppress(FileNotFoundError):
            os.unlink(path / name)
    with suppress(OSError):
        os.rmdir(path)
