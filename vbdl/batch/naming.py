"""The names of the files that a job writes, by which a file is recognized as that job's.

Whatever is read back from a disk is checked against these names before anything is replaced or deleted.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

JOURNAL, MANIFEST, QUARANTINE, LOCK = "_journal.jsonl", "_manifest.json", "_quarantine.jsonl", "_lock"
QUARANTINE_PARTS = "_quarantine"  # the folder of quarantined rows, one file per part, until they are gathered
STAGED = "_staged"  # a file that is about to be renamed to one beside the folder
SET_ASIDE = "_changed-"  # prefix of a changed part that no job replaces
FORMATS = {"parquet": ".parquet", "csv": ".csv", "arrow": ".arrow", "npy": ".npy"}

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+(-[0-9a-f]{8})?\.tmp", re.DOTALL)
_PART = re.compile(r"(?P<stem>.+)-(?P<chunk>\d{5,18})(?P<suffix>\.[a-z]+)", re.DOTALL)


def part_name(source: str, chunk: int, kind: str) -> str:
    """Return the file name of a part: its source's name without suffix, and the number of the chunk."""
    return f"{_stem(source)}-{chunk:05d}{FORMATS[kind]}"


def _stem(source: str) -> str:
    stem = source.removesuffix(".gz")
    return stem if (dot := stem.rfind(".")) <= stem.rfind("/") + 1 else stem[:dot]


def quarantine_name(part: str) -> str:
    return f"{QUARANTINE_PARTS}/{part}.jsonl"


def inside(name: str) -> bool:
    """Whether a relative file name stays inside the folder it is resolved in."""
    try:
        os.fsencode(name)
    except UnicodeError:
        return False
    words = name.split("/")
    return "\0" not in name and not any(word in ("", ".", "..") or len(word) > 255 for word in words)


class Names:
    """The names of the files that a job with these settings writes. Settings read from a disk may be anything."""

    def __init__(self, settings: object):
        told = settings if isinstance(settings, dict) else {}
        kind, states = told.get("format"), told.get("input")
        names = [s.get("name") for s in states if isinstance(s, dict)] if isinstance(states, list) else []
        self.kind = kind if isinstance(kind, str) and kind in FORMATS else None
        self.sources = {name for name in names if isinstance(name, str)}
        self._stems = {stem for name in self.sources if inside(stem := _stem(name))}

    def is_part(self, name: str) -> bool:
        match = _PART.fullmatch(name)
        if match is None or self.kind is None or match["stem"] not in self._stems:
            return False
        return name == f"{match['stem']}-{int(match['chunk']):05d}{FORMATS[self.kind]}"

    def is_the_part_of(self, name: str, source: object, chunk: object) -> bool:
        """Whether this is the name that the job gives to this chunk of this source."""
        if self.kind is None or not isinstance(source, str) or source not in self.sources:
            return False
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 0:
            return False
        return inside(name) and name == part_name(source, chunk, self.kind)

    def is_in_work(self, name: str) -> bool:
        """Whether the file exists only while the job runs: its journal, or a file that is not completely written."""
        above, _, last = name.rpartition("/")
        if (unfinished := _TEMPORARY.fullmatch(last)) is not None:
            whole = f"{above}/{unfinished['name']}" if above else unfinished["name"]
            return whole in (MANIFEST, QUARANTINE) or self.is_part(whole) or self.is_in_work(whole)
        if name.startswith(f"{QUARANTINE_PARTS}/") and name.endswith(".jsonl"):
            return self.is_part(name.removeprefix(f"{QUARANTINE_PARTS}/").removesuffix(".jsonl"))
        return name in (JOURNAL, STAGED)


def check_place(folder: Path, name: str) -> bool:
    """Whether the folder contains a file of this name.

    Raises ValueError if the name is that of a link or a folder, or its path leads through a link, because the file
    would be read, replaced or deleted elsewhere.
    """
    path = folder
    words = name.split("/")
    for number, word in enumerate(words):
        path = path / word
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
        last = number == len(words) - 1
        if not (stat.S_ISREG(mode) if last else stat.S_ISDIR(mode)):
            what = "a link" if stat.S_ISLNK(mode) else "no file" if last else "no folder"
            raise ValueError(f"{path} is {what}, which no job has made: remove it, or choose another folder")
    return True


def files_below(folder: Path) -> Iterator[str]:
    """Return the relative names of all files in the folder and below; links are not followed.

    Files may vanish meanwhile, because an actor of a killed job may still be running.
    """
    for above, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(above, name)
            try:
                is_file = stat.S_ISREG(os.lstat(path).st_mode)
            except FileNotFoundError:
                continue
            if is_file:
                yield path.relative_to(folder).as_posix()
