"""Detection of inputs that change while a job reads them, whose predictions would mix two versions."""

import contextlib
from collections.abc import Iterator, Sequence

from vbdl.batch.sources.source import Source

CHANGED = "was changed or replaced while it was read: its predictions may be of two versions of it."


class Versions:
    """The versions of a job's sources at its start."""

    def __init__(self, sources: Sequence[Source]):
        self._before = [(source, source.version()) for source in sources]

    def changed(self) -> list[Source]:
        """Return the sources whose version has changed."""
        return [source for source, version in self._before if source.version() != version]

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """A context in which a reading error becomes one that names the changed source, if a source has changed."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            for source in self.changed():
                raise ValueError(f"{source.name} {CHANGED} Predict it again. Reading it ended in: {error}") from error
            raise
