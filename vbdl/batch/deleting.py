"""The hidden folder of parts of a job whose output is one file, when it is done."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from vbdl.batch.locking import lock
from vbdl.batch.naming import JOURNAL, LOCK, MANIFEST, QUARANTINE, Names, files_below
from vbdl.batch.records import read_records


def discard(path: Path, settings: dict[str, Any]) -> None:
    """Deletes what a job of these settings has left in its hidden folder, and the folder, where nothing else is in it;
    not where another job's records are there, or another process is at work in it."""
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
    """Deletes what a job of these names has written, and the folder, where nothing else is in it. The records go last:
    until then they say what the rest is."""
    for name in files_below(path):
        if name != JOURNAL and (names.is_part(name) or names.is_in_work(name)):
            (path / name).unlink(missing_ok=True)
    for above, folders, _ in os.walk(path, topdown=False):
        for folder in folders:
            with suppress(OSError):  # a link, or there is something else in it
                os.rmdir(Path(above, folder))
    for name in (QUARANTINE, JOURNAL, MANIFEST, LOCK):
        with suppress(FileNotFoundError):
            os.unlink(path / name)
    with suppress(OSError):
        os.rmdir(path)
