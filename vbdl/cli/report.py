"""The command `vbdl report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

_SPEED = Path("benchmarks/results/speed-cpu.jsonl")


@dataclass(frozen=True)
class Report:
    """Write a run of `vbdl bench` as one self-contained HTML page, light and dark, readable on a phone."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path | None = None
    """File of the page; RUN/report.html unless given."""
    speed: Path | None = None
    """JSON lines of benchmarks/speed.py to show beside the scores; benchmarks/results/speed-cpu.jsonl unless given, if
    it exists."""

    def __call__(self) -> None:
        try:
            import jinja2  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("the report needs Jinja2: pip install 'vbdl[report]'") from error
        from vbdl.report.page import write

        speed = self.speed if self.speed is not None else _SPEED if _SPEED.is_file() else None
        path = write(self.run, self.out, speed)
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
