"""What a job has written down about itself, read back as what a stranger or a bad disk may have left there.

The journal is a line a record: first the job's settings, then a part each. A line ends in a check, a digest of itself
and of the settings: a line that is damaged, or of another job, does not pass it. The manifest takes the journal's
place when all parts are there. Records of vbdl 0.1 have no checks and are read by their form alone.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vbdl.batch.naming import JOURNAL, MANIFEST, Names, check_place, inside

_FORM = {"part": str, "source": str, "chunk": int, "rows": int, "rejected": int, "bytes": int, "sha256": str}
_MANIFEST = {"rows", "rejected", "failed", "parts", "settings", "check", "output", "quarantine"}
_MORE = {"unseen": dict, "filled": dict, "quarantine": str, "check": str}  # not in records of vbdl 0.1


@dataclass
class Records:
    """What the journal and the manifest of a folder say."""

    settings: dict[str, Any] | None = None  # of the job, None where they cannot be read
    entries: list[dict[str, Any]] = field(default_factory=list)  # of parts, those that can be relied on
    finished: dict[str, Any] | None = None  # the manifest, where it is whole
    damaged: bool = False  # whether something could not be read, or is of another job
    unknown: bool = False  # whether there are entries that may be of another job, and no settings that say which
    written: int | None = None  # when the last record was written, in nanoseconds


def job_of(settings: dict[str, Any]) -> str:
    """A digest of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def signed(record: dict[str, Any], job: str) -> dict[str, Any]:
    """The record with its check."""
    return {**record, "check": _check(record, job)}


def _check(record: dict[str, Any], job: str) -> str:
    content = json.dumps({k: v for k, v in record.items() if k != "check"}, sort_keys=True)
    return hashlib.sha256(f"{job} {content}".encode()).hexdigest()[:16]


def is_whole(record: dict[str, Any], job: str) -> bool:
    """Whether the check is right, or there is none."""
    return "check" not in record or record["check"] == _check(record, job)


def is_manifest(record: dict[str, Any]) -> bool:
    """Whether this is the manifest of a finished job, of this or another one, and undamaged."""
    settings, parts, failed = record.get("settings"), record.get("parts"), record.get("failed")
    if not isinstance(settings, dict) or not isinstance(parts, list) or not isinstance(failed, dict):
        return False
    if not all(type(record.get(k)) is int for k in ("rows", "rejected")) or not set(record) <= _MANIFEST:
        return False
    if not all(isinstance(p, dict) and ("check" in record or "check" not in p) for p in parts):
        return False
    return is_whole(record, job_of(settings))


def parsed(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    found = _json(text)
    return found if isinstance(found, dict) else None


def _json(text: bytes) -> Any:
    """A JSON value, Ellipsis where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ...


def is_anothers(text: bytes) -> bool:
    """Whether a text is whole JSON, and no record of a job, not even a damaged one."""
    found = _json(text)
    if isinstance(found, dict):
        return "settings" not in found and "check" not in found
    return found is not ...


def read_records(folder: Path, settings: dict[str, Any]) -> Records:
    """What is known of the job in a folder; settings: of the job that asks.

    ValueError, with the folder as it was, where a record names a file that the job would not have written: an absolute
    path, a way out of the folder, a link, another's file.
    """
    journal, manifest = (_content(folder, name) for name in (JOURNAL, MANIFEST))
    found = Records()
    objects: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    for name, text in ((JOURNAL, (journal or b"").partition(b"\n")[0]), (MANIFEST, manifest or b"")):
        if is_anothers(text):
            raise ValueError(f"{folder / name} was not written by vbdl: choose another folder")
    if manifest is not None:
        whole = parsed(manifest)
        found.damaged |= whole is None
        if whole is not None:
            heads.append(whole)
            parts = whole.get("parts")
            objects += [p for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
            if is_manifest(whole):
                found.settings, found.finished = whole["settings"], whole
            found.damaged |= found.finished is None
    if journal is not None and found.finished is None:
        lines = journal.split(b"\n")
        head, *rest = map(parsed, lines[:-1]) if len(lines) > 1 else [None]
        found.settings = None if head is None else _settings(head)
        found.damaged |= bool(lines[-1]) or None in (head, *rest)
        objects += [line for line in rest if line is not None]
        heads += [head] if head is not None else []
    names, job = Names(found.settings or settings), job_of(found.settings or settings)
    checked = any("check" in record for record in (*objects, *heads))
    known = found.settings is not None or any(head.get("settings") == settings for head in heads)
    for entry in objects:
        _refuse_outsider(folder, entry, names, job, known)
    for entry in objects:
        if _usable(entry, names, job) and ("check" in entry or not checked):
            found.entries.append(entry)
        else:
            found.damaged, found.finished = True, None
            found.unknown |= found.settings is None
    if found.settings is None and found.entries:  # they pass the check of the job that asks
        found.settings = settings
    for name in (JOURNAL, MANIFEST):
        if (folder / name).exists():
            found.written = written_at(folder / name)
    return found


def written_at(path: Path) -> int:
    """When a file was written, in nanoseconds; no later than it can have been, whatever time it was given since."""
    about = os.lstat(path)
    return min(about.st_mtime_ns, about.st_ctime_ns)


def _content(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if check_place(folder, name) else None


def _settings(head: dict[str, Any]) -> dict[str, Any] | None:
    """The settings in the first line of a journal, where they can be relied on."""
    found = head.get("settings")
    if not isinstance(found, dict) or not set(head) <= {"settings", "check"}:
        return None
    return found if is_whole(head, job_of(found)) else None


def _refuse_outsider(folder: Path, entry: dict[str, Any], names: Names, job: str, known: bool) -> None:
    """known: whether the settings are those of the records, and so the names of parts."""
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


def _usable(entry: dict[str, Any], names: Names, job: str) -> bool:
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
