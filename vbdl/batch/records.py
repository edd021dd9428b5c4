"""The records of a job: a journal while it runs, a manifest when it is done. They are read with distrust, because a
stranger or a bad disk may have changed them.

The journal is a line a record: first the job's settings, then a part each. A line ends in a check, a digest of itself
and of the settings: a line that is damaged, or of another job, does not pass it. The manifest takes the journal's
place when all parts are there. Records of vbdl 0.1 have no checks and are read by their form alone.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeGuard, TypeVar, cast

from vbdl.batch.naming import JOURNAL, MANIFEST, Names, check_place, inside

_FORM = {"part": str, "source": str, "chunk": int, "rows": int, "rejected": int, "bytes": int, "sha256": str}
_MANIFEST = {"rows", "rejected", "failed", "parts", "settings", "check", "output", "quarantine"}
_MORE = {"unseen": dict, "filled": dict, "quarantine": str, "check": str}  # not in records of vbdl 0.1


JobRecord = dict[str, Any]
"""What a job is, as `Job.recorded` says it in JSON; under "settings" in journal and manifest."""


class FileIdentity(TypedDict):
    """The size and the content of a file."""

    bytes: int
    sha256: str


class PartEntry(FileIdentity):
    """A line of the journal: the part of one chunk."""

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
    """A part that the journal does not know yet."""

    partial: str  # the hidden name


class Manifest(TypedDict):
    """The record of a finished job; it has `output` and `quarantine` if the parts became one file."""

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
    """The content of the journal and the manifest of a folder, as far as it can be trusted."""

    settings: JobRecord | None = None  # of the job, None where they cannot be read
    entries: list[PartEntry] = field(default_factory=list)  # of parts, those that can be relied on
    finished: Manifest | None = None  # the manifest, where it is whole
    damaged: bool = False  # whether something could not be read, or is of another job
    unknown: bool = False  # whether there are entries that may be of another job, and no settings that say which
    written: int | None = None  # when the last record was written, in nanoseconds


def job_of(settings: JobRecord) -> str:
    """SHA-256 of the settings, which identifies a job."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


R = TypeVar("R", bound=Mapping[str, object])


def signed(record: R, job: str) -> R:
    """The record with a check added: a digest of the record and of its job."""
    return cast(R, {**record, "check": _check(record, job)})


def _check(record: Mapping[str, object], job: str) -> str:
    content = json.dumps({k: v for k, v in record.items() if k != "check"}, sort_keys=True)
    return hashlib.sha256(f"{job} {content}".encode()).hexdigest()[:16]


def is_whole(record: Mapping[str, object], job: str) -> bool:
    """Whether the check of a record is right, or it has none."""
    return "check" not in record or record["check"] == _check(record, job)


def is_manifest(record: dict[str, Any]) -> TypeGuard[Manifest]:
    """Whether this is the undamaged manifest of a finished job, whichever job that is."""
    settings, parts, failed = record.get("settings"), record.get("parts"), record.get("failed")
    if not isinstance(settings, dict) or not isinstance(parts, list) or not isinstance(failed, dict):
        return False
    if not all(type(record.get(k)) is int for k in ("rows", "rejected")) or not set(record) <= _MANIFEST:
        return False
    if not all(isinstance(p, dict) and ("check" in record or "check" not in p) for p in parts):
        return False
    return is_whole(record, job_of(settings))


def parsed(text: bytes) -> dict[str, Any] | None:
    """The JSON object in this text, or None if it is no JSON object."""
    value = _json(text)
    return value if isinstance(value, dict) else None


def _json(text: bytes) -> object:
    """The JSON value in this text, or Ellipsis if it is not JSON."""
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
    """Read the records in a folder. settings: of the job that is to be started or resumed.

    ValueError, with the folder as it was, where a record names a file that the job would not have written: an absolute
    path, a way out of the folder, a link, another's file.
    """
    journal, manifest = (_content(folder, name) for name in (JOURNAL, MANIFEST))
    records = Records()
    objects: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
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
    if records.settings is None and records.entries:  # they pass the check of the job that asks
        records.settings = settings
    for name in (JOURNAL, MANIFEST):
        if (folder / name).exists():
            records.written = written_at(folder / name)
    return records


def written_at(path: Path) -> int:
    """The time when a file was written, in nanoseconds; not later than that, even if its times were set since."""
    about = os.lstat(path)
    return min(about.st_mtime_ns, about.st_ctime_ns)


def _content(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if check_place(folder, name) else None


def _settings(head: dict[str, Any]) -> JobRecord | None:
    """The settings in the first line of a journal, or None if the line is damaged."""
    settings = head.get("settings")
    if not isinstance(settings, dict) or not set(head) <= {"settings", "check"}:
        return None
    return settings if is_whole(head, job_of(settings)) else None


def _refuse_outsider(folder: Path, entry: dict[str, Any], names: Names, job: str, known: bool) -> None:
    """Raise ValueError if an entry names a file that its job would not have written.

    known: whether the settings are those of the records, and with them the names of parts.
    """
    part = entry.get("part")
    if not isinstance(part, str):
        return
    if inside(part):
        there, whole = check_place(folder, part), is_whole(entry, job)
        if not known or names.is_the_part_of(part, entry.get("source"), entry.get("chunk")):
            return
        if not whole and (names.is_part(part) or not there):  # a damaged line: nothing is done by it
            return
    raise ValueError(
        f"the records of the job in {folder} name {part!r}, which is no part of it: they were changed, or not written "
        f"by vbdl. Nothing was done: choose another folder, or remove {JOURNAL} and {MANIFEST} there"
    )


def _usable(entry: dict[str, Any], names: Names, job: str) -> TypeGuard[PartEntry]:
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
