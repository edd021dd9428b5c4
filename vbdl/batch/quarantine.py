"""Lists of quarantined rows: a file for each part while the job runs, and one file when it is done."""

from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from vbdl.batch.naming import QUARANTINE, quarantine_name
from vbdl.batch.records import Manifest, PartEntry
from vbdl.batch.writing import write_atomic


class Quarantine:
    """The lists of quarantined rows of an earlier run.

    finished: the manifest if the job is finished and one file holds the lines of all parts, else None.
    """

    def __init__(self, folder: Path, finished: Manifest | None):
        self._folder, self._is_finished = folder, finished is not None
        self._lines: dict[str, bytes] = {}
        if finished is not None:
            with suppress(FileNotFoundError), open(folder / QUARANTINE, "rb") as file:
                for entry in finished["parts"]:
                    self._lines[entry["part"]] = b"".join(file.readline() for _ in range(entry["rejected"]))

    def holds(self, entry: PartEntry) -> bool:
        """Whether the list of this part matches its journal entry."""
        if not entry["rejected"]:
            return True
        lines = self._lines.get(entry["part"])
        if not self._is_finished:
            with suppress(FileNotFoundError):
                lines = (self._folder / quarantine_name(entry["part"])).read_bytes()
        if lines is None or lines.count(b"\n") != entry["rejected"]:
            return False
        return "quarantine" not in entry or entry["quarantine"] == sha256(lines).hexdigest()

    def split_off(self, entry: PartEntry) -> None:
        """Write the list of one part of a finished job to a separate file again."""
        if entry["rejected"]:
            lines = self._lines[entry["part"]]
            write_atomic(self._folder / quarantine_name(entry["part"]), lambda p: p.write_bytes(lines))


def gather(folder: Path, parts: Iterable[PartEntry]) -> None:
    """Write the lists of all parts to one file, in this order; write no file if no row was rejected."""
    rejected = [entry["part"] for entry in parts if entry["rejected"]]

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            for part in rejected:
                file.write((folder / quarantine_name(part)).read_bytes())

    if rejected:
        write_atomic(folder / QUARANTINE, write)
