"""The options of a batch job, without its model and rows."""

import json
from dataclasses import dataclass

from vbdl import former
from vbdl.batch.output import COLUMNS
from vbdl.types import Json


@dataclass(frozen=True)
class JobOptions:
    """Options that determine the results of a job or how it is computed.

    columns: output columns, see `vbdl.batch.output`. keep: input columns to copy to the output. interval: level of
    `lower` and `upper`, instead of the calibrated ones. inputs: columns of a model that was not trained on a table, in
    the order of its inputs. tile: rows that are computed together; results depend on it only by rounding, and not at
    all on chunk_rows and workers. compile: None compiles for large inputs.
    """

    columns: tuple[str, ...] | None = None
    keep: tuple[str, ...] = ()
    interval: float = 0.0
    inputs: tuple[str, ...] | None = None
    tile: int = 256
    compile: bool | None = None
    chunk_rows: int = 65_536
    trust: tuple[str, ...] = ()  # packages that the network may be imported from

    def __post_init__(self):
        if self.tile < 1 or (self.tile > 1 and self.tile % 64):
            raise ValueError(f"tile is 1 or a multiple of 64, so that no row depends on its neighbors; got {self.tile}")
        if unknown := [name for name in self.columns or () if name not in COLUMNS]:
            raise ValueError(f"there is no output column {unknown[0]!r}; there are {', '.join(COLUMNS)}")
        if self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is at least 1, got {self.chunk_rows}")
        if not 0.0 <= self.interval < 1.0:
            raise ValueError(f"interval is a level in (0, 1), or 0 for none; got {self.interval}")

    def recorded(self) -> Json:
        """Return the options that the output depends on, for JSON."""
        return json.loads(json.dumps({name: value for name, value in vars(self).items() if name != "trust"}))


__getattr__ = former.names(__name__, {"Options": "JobOptions"})
