"""Inputs that change while a job reads them: its predictions would be of two versions of the input."""

import contextlib
from collections.abc import Iterator, Sequence

from vbdl.batch.sources import Source

CHANGED = "was changed or replaced while it was read: its predictions may be of two versions of it."


class Versions:
    """The versions of the sources when a job began."""

    def __init__(self, sources: Sequence[Source]):
        self._before = [(source, source.version()) for source in sources]

    def changed(self) -> list[Source]:
        """The sources that have another version now."""
        return [source for source, version in self._before if source.version() != version]

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Inside, an error of reading half a file becomes one that names the source that changed, if one did."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            for source in self.changed():
                raise ValueError(f"{source.name} {CHANGED} Predict it again. Reading it ended in: {error}") from error
            raise
