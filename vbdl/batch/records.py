"""The records of a job: a journal while it runs, a manifest when it is done. Reading checks them, because other people
or a bad disk may have changed them.

The journal has one record per line: first the job's settings, then one line for each part. A line ends in a check,
which is a digest of the line and of the settings, so a damaged line or a line of another job fails the check. The
manifest replaces the journal when all parts exist. Records of vbdl 0.1 have no checks; only their form is checked.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict, TypeGuard, TypeVar, cast

from vbdl.batch.naming import JOURNAL, MANIFEST, Names, check_place, inside
from vbdl.types import Json

_FORM = {"part": str, "source": str, "chunk": int, "rows": int, "rejected": int, "bytes": int, "sha256": str}
_MANIFEST = {"rows", "rejected", "failed", "parts", "settings", "check", "output", "quarantine"}
_MORE = {"unseen": dict, "filled": dict, "quarantine": str, "check": str}  # missing in records of vbdl 0.1


JobRecord = Json
"""The description of a job that `Job.recorded` returns; "settings" in journal and manifest."""


class FileIdentity(TypedDict):
    """The size and the digest of a file."""

    bytes: int
    sha256: str


class PartEntry(FileIdentity):
    """A line of the journal, which describes the part of one chunk."""

    part: str
    source: str
    chunk: int
    rows: int
    rejected: int
    unseen: NotRequired[dict[str, int]]
    filled: NotRequired[dict[str, int]]
    quarantine: NotRequired[str]  # SHA-256 of the lines of its quarantined rows
    check: NotRequired[str]


class DraftEntry(PartEntry):
    """A part that is not yet in the journal."""

    partial: str  # hidden name of the part


class Manifest(TypedDict):
    """The record of a finished job, with `output` and `quarantine` if the parts became one file."""

    rows: int
    rejected: int
    failed: dict[str, str]
    parts: list[PartEntry]
    settings: JobRecord
    output: NotRequired[FileIdentity]
    quarantine: NotRequired[FileIdentity]
    check: NotRequired[str]


@dataclass
class Records:
    """The content of a folder's journal and manifest, as far as it passes the checks."""

    settings: JobRecord | None = None  # settings of the job, None if they cannot be read
    entries: list[PartEntry] = field(default_factory=list)  # entries of parts that pass the checks
    finished: Manifest | None = None  # the manifest if it is undamaged
    damaged: bool = False  # whether a record could not be read, or belongs to another job
    unknown: bool = False  # whether entries may belong to another job, because the settings are missing
    written: int | None = None  # time of the last record's writing, in nanoseconds


def job_of(settings: JobRecord) -> str:
    """Return the SHA-256 of the settings, which identifies a job."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


R = TypeVar("R", bound=Mapping[str, object])


def signed(record: R, job: str) -> R:
    """Return the record with a check: a digest of the record and of its job."""
    return cast(R, {**record, "check": _check(record, job)})


def _check(record: Mapping[str, object], job: str) -> str:
    content = json.dumps({k: v for k, v in record.items() if k != "check"}, sort_keys=True)
    return hashlib.sha256(f"{job} {content}".encode()).hexdigest()[:16]


def is_whole(record: Mapping[str, object], job: str) -> bool:
    """Whether a record has a correct check or no check."""
    return "check" not in record or record["check"] == _check(record, job)


def is_manifest(record: Mapping[str, object]) -> TypeGuard[Manifest]:
    """Whether this is the undamaged manifest of any finished job."""
    settings, parts, failed = record.get("settings"), record.get("parts"), record.get("failed")
    if not isinstance(settings, dict) or not isinstance(parts, list) or not isinstance(failed, dict):
        return False
    if not all(type(record.get(k)) is int for k in ("rows", "rejected")) or not set(record) <= _MANIFEST:
        return False
    if not all(isinstance(p, dict) and ("check" in record or "check" not in p) for p in parts):
        return False
    return is_whole(record, job_of(settings))


def parsed(text: bytes) -> Json | None:
    """Return the JSON object in this text, or None if the text is no JSON object."""
    value = _json(text)
    return value if isinstance(value, dict) else None


def _json(text: bytes) -> object:
    """Return the JSON value in this text, or Ellipsis if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ...


def is_anothers(text: bytes) -> bool:
    """Whether this text is valid JSON that no job wrote, not even a damaged record."""
    value = _json(text)
    if isinstance(value, dict):
        return "settings" not in value and "check" not in value
    return value is not ...


def read_records(folder: Path, settings: JobRecord) -> Records:
    """Read the records in a folder. settings: those of the job that is to be started or resumed.

    Raises ValueError, and leaves the folder unchanged, if a record names a file that the job would not have written:
    an absolute path, a path out of the folder, a link, or a file of someone else.
    """
    journal, manifest = (_content(folder, name) for name in (JOURNAL, MANIFEST))
    records = Records()
    objects: list[Json] = []
    heads: list[Json] = []
    for name, text in ((JOURNAL, (journal or b"").partition(b"\n")[0]), (MANIFEST, manifest or b"")):
        if is_anothers(text):
            raise ValueError(f"{folder / name} was not written by vbdl: choose another folder")
    if manifest is not None:
        whole = parsed(manifest)
        records.damaged |= whole is None
        if whole is not None:
            heads.append(whole)
            parts = whole.get("parts")
            objects += [p for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
            if is_manifest(whole):
                records.settings, records.finished = whole["settings"], whole
            records.damaged |= records.finished is None
    if journal is not None and records.finished is None:
        lines = journal.split(b"\n")
        head, *rest = map(parsed, lines[:-1]) if len(lines) > 1 else [None]
        records.settings = None if head is None else _settings(head)
        records.damaged |= bool(lines[-1]) or None in (head, *rest)
        objects += [line for line in rest if line is not None]
        heads += [head] if head is not None else []
    names, job = Names(records.settings or settings), job_of(records.settings or settings)
    checked = any("check" in record for record in (*objects, *heads))
    known = records.settings is not None or any(head.get("settings") == settings for head in heads)
    for entry in objects:
        _refuse_outsider(folder, entry, names, job, known)
    for entry in objects:
        if ("check" in entry or not checked) and _usable(entry, names, job):
            records.entries.append(entry)
        else:
            records.damaged, records.finished = True, None
            records.unknown |= records.settings is None
    if records.settings is None and records.entries:  # the entries pass the check with the given settings
        records.settings = settings
    for name in (JOURNAL, MANIFEST):
        if (folder / name).exists():
            records.written = written_at(folder / name)
    return records


def written_at(path: Path) -> int:
    """Return a time in nanoseconds that is not later than the writing of a file, even if its times were set since."""
    about = os.lstat(path)
    return min(about.st_mtime_ns, about.st_ctime_ns)


def _content(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if check_place(folder, name) else None


def _settings(head: Mapping[str, object]) -> JobRecord | None:
    """Return the settings in the first line of a journal, or None if the line is damaged."""
    settings = head.get("settings")
    if not isinstance(settings, dict) or not set(head) <= {"settings", "check"}:
        return None
    return settings if is_whole(head, job_of(settings)) else None


def _refuse_outsider(folder: Path, entry: Mapping[str, object], names: Names, job: str, known: bool) -> None:
    """Raise ValueError if an entry names a file that its job would not have written.

    known: whether the settings of the records, and so the names of parts, are known.
    """
    part = entry.get("part")
    if not isinstance(part, str):
        return
    if inside(part):
        there, whole = check_place(folder, part), is_whole(entry, job)
        if not known or names.is_the_part_of(part, entry.get("source"), entry.get("chunk")):
            return
        if not whole and (names.is_part(part) or not there):  # a damaged line has no effect
            return
    raise ValueError(
        f"the records of the job in {folder} name {part!r}, which is no part of it: they were changed, or not written "
        f"by vbdl. Nothing was done: choose another folder, or remove {JOURNAL} and {MANIFEST} there"
    )


def _usable(entry: Json, names: Names, job: str) -> TypeGuard[PartEntry]:
    if any(type(entry.get(key)) is not kind for key, kind in _FORM.items()):
        return False
    if any(key not in _FORM and not (key in _MORE and type(value) is _MORE[key]) for key, value in entry.items()):
        return False
    if min(entry["rows"], entry["rejected"], entry["bytes"]) < 0 or not is_whole(entry, job):
        return False
    counts = [*entry.get("unseen", {}).values(), *entry.get("filled", {}).values()]
    if any(type(count) is not int for count in counts):
        return False
    return names.is_the_part_of(entry["part"], entry["source"], entry["chunk"])
