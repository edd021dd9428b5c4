"""The report of a batch job, for people and programs."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vbdl import former
from vbdl.batch.records import Manifest, PartEntry
from vbdl.batch.sources.source import printable


@dataclass
class JobReport:
    """The results of all runs of a job; `seconds` are those of the last run. resumed: number of earlier runs' parts."""

    rows: int
    rejected: int
    seconds: float
    parts: int
    resumed: int
    failed: dict[str, str] = field(default_factory=dict)  # sources that could not be read to their end
    unseen: dict[str, int] = field(default_factory=dict)  # column -> cells with a category unknown to training
    out: Path | None = None
    quarantine: Path | None = None
    reasons: list[str] = field(default_factory=list)  # reasons of the first quarantined rows
    filled: dict[str, int] = field(default_factory=dict)  # column -> missing cells of columns that had none in training
    damaged: list[str] = field(default_factory=list)  # files that were missing or changed, and were written again

    def __str__(self) -> str:
        rate = f", {self.rows / self.seconds:,.0f} rows/s" if self.seconds > 0 and not self.resumed else ""
        lines = [
            f"{_counted(self.rows, 'row')} in {self.seconds:.1f} s{rate}, {_counted(self.parts, 'part')}"
            + (f", {self.resumed} of them from before" if self.resumed else "")
        ]
        if self.out is not None:
            lines.append(f"written to {self.out}")
        if self.damaged:
            shown = ", ".join(self.damaged[:3]) + (", ..." if len(self.damaged) > 3 else "")
            count = _counted(len(self.damaged), "file")
            lines.append(f"{count} of the output had gone or changed, and were computed again: {shown}")
        if self.rejected:
            where = "" if self.quarantine is None else f", see {self.quarantine}"
            lines.append(f"{_counted(self.rejected, 'row')} could not be used{where}")
            lines += [f"  {reason}" for reason in self.reasons[:3]]
        lines += [f"failed: {name}: {why}" for name, why in self.failed.items()]
        lines += [
            f"column {n!r}: {_counted(count, 'cell')} with a category that training did not have"
            for n, count in self.unseen.items()
        ]
        lines += [
            f"column {n!r}: {_counted(count, 'missing cell')} filled, where training had none"
            for n, count in self.filled.items()
        ]
        return printable("\n".join(lines))


def _counted(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def report_of(
    manifest: Manifest, seconds: float, resumed: int, out: Path, quarantine: Path, damaged: list[str]
) -> JobReport:
    """Return the report of the job with this manifest. damaged: names of the files that were written again."""
    parts = manifest["parts"]
    path = quarantine if manifest["rejected"] else None
    return JobReport(
        rows=manifest["rows"],
        rejected=manifest["rejected"],
        seconds=seconds,
        parts=len(parts),
        resumed=resumed,
        failed=manifest["failed"],
        unseen=_summed(parts, "unseen"),
        out=out,
        quarantine=path,
        reasons=_first_lines(path),
        filled=_summed(parts, "filled"),
        damaged=damaged,
    )


def _summed(parts: list[PartEntry], key: Literal["unseen", "filled"]) -> dict[str, int]:
    total: dict[str, int] = {}
    for entry in parts:
        for name, count in entry.get(key, {}).items():
            total[name] = total.get(name, 0) + count
    return total


def _first_lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    with open(path) as file:
        lines = [json.loads(line) for _, line in zip(range(3), file, strict=False)]
    return [f"{e['source']}, row {e['row']}: {e['reason']}" for e in lines]


__getattr__ = former.names(__name__, {"Report": "JobReport"})
