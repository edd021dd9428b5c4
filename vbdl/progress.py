"""Progress of long work: a bar on a terminal, log lines elsewhere, nothing for work that ends within seconds."""

import logging
import sys
import time
from types import TracebackType

logger = logging.getLogger("vbdl")

_QUIET_SECONDS = 2.0  # time before progress is shown
_LINE_SECONDS = 15.0  # time between two log lines


class Progress:
    """A progress display: `with Progress("training", total) as bar: bar.advance("loss 0.31")`.

    total: number of steps; may be changed on the way, and the remaining time follows it.
    shown: True shows a bar, False nothing; None shows a bar on a terminal and logs lines elsewhere.
    """

    def __init__(self, title: str, total: int, shown: bool | None = None):
        self.title, self.total, self.done = title, total, 0
        self._shown = shown
        self._bar = None
        self._task = None

    def __enter__(self) -> "Progress":
        self._start = self._last = time.monotonic()
        return self

    def advance(self, note: str = "", by: int = 1) -> None:
        """Count `by` more steps as done, and show the note behind the bar."""
        self.done += by
        now = time.monotonic()
        if self._shown is False or now - self._start < _QUIET_SECONDS:
            return
        if self._shown or sys.stderr.isatty():
            self._draw(note)
        elif now - self._last >= _LINE_SECONDS:
            self._last = now
            left = (now - self._start) / self.done * (self.total - self.done)
            logger.info("%s: %d of %d, %.0f s left %s", self.title, self.done, self.total, left, note)

    def _draw(self, note: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, note=note)
        assert self._task is not None
        self._bar.update(self._task, completed=self.done, total=self.total, note=note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
